"""A picture of watch records: a number of every module, step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerwise.common.alike_names import in_one, siblings_of
from layerwise.common.checked import checked
from layerwise.common.group_by import group_by
from layerwise.common.text_table import LONG
from layerwise.errors import LayerwiseError
from layerwise.function_space.watching.watch_record import WatchRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What is known of units, which other quantities are not: fields of `LayerRate`.
OF_UNITS = ("multiplier", "squared_norm")
_ROW, _TALLEST = 0.16, 12.0  # inches


@checked
def plot_watch(records: Iterable[WatchRecord] | str | Path, quantity: str = "ratio", ax: Any = None) -> Axes:
    """Draw a quantity of watch records: a row a module, from the input of the network to its output, a column a record.

    Of more than 40 rows those of blocks that are alike stand together, the first block on top. Colours are on a logarithmic
    scale; of a `multiplier` white is 1, of a quantity that has both signs white is 0. Needs matplotlib.

    Args:
        records: `Watch.records`, or the file that `watch(to="watch.jsonl")` has written.
        quantity: a field of a module in `WatchRecord.to_dict()`: `"lr"`, `"weight_rms"`, `"update_rms"`, `"ratio"`,
            `"spectral"`, `"gradient_rms"`, `"noise_to_signal"`, `"loss_change"`, `"rate"`, `"share"`; or of a unit, of those
            whose rate a rule sets: `"multiplier"`, `"squared_norm"`.
        ax: matplotlib axes to draw on; default: a new figure.

    Returns:
        The axes: `axes.figure.savefig("ratio.png")`.

    Raises:
        LayerwiseError: a file that cannot be read; no record that has the quantity.

    Examples:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> watch = lw.watch(model, optimizer, every=1)
        >>> for _ in range(3):
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> axes = lw.plot_watch(watch.records, "update_rms")
        >>> axes.get_title()
        'update_rms'
    """
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    steps, columns = _read(records, quantity)
    names = list(dict.fromkeys(name for column in columns for name in column))
    bands = [[name] for name in names] if len(names) <= LONG else [*group_by(names, siblings_of).values()]
    rows = [name for band in bands for name in band]
    values = np.array([[column.get(name, math.nan) for column in columns] for name in rows])
    height = min(1.2 + _ROW * len(rows), _TALLEST)
    axes = ax if ax is not None else plt.subplots(figsize=(8, height), layout="constrained")[1]
    colours = _colours(values, quantity)
    image = axes.pcolormesh(_edges(steps), np.arange(len(rows) + 1), values, rasterized=True, **colours)
    axes.set_ylim(len(rows), 0)
    ends = np.cumsum([len(band) for band in bands])
    middles = ends - np.array([len(band) for band in bands]) / 2
    axes.set_yticks(middles, [in_one(band) for band in bands], fontsize="small")
    for end in ends[:-1] if len(bands) < len(rows) else ():
        axes.axhline(end, color="white", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_title(quantity)
    bar = axes.figure.colorbar(image, ax=axes)
    if isinstance(image.norm, LogNorm):
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter("{x:g}")
    return axes


def _read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Of a run that goes on, or was killed, the last line may be cut."""
    needed = "give the file that watch(to=...) has written"
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise LayerwiseError(f"{path}: {error}: {needed}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"], row["modules"]
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise LayerwiseError(f"{path}, line {number}, is no record of a watch: {needed}") from None
    return rows


def _read(records: Iterable[WatchRecord] | str | Path, quantity: str) -> tuple[list[int], list[dict[str, float]]]:
    """The steps at which the quantity is known, and its values there, by name."""
    rows = _read_lines(records) if isinstance(records, (str, Path)) else [record.to_dict() for record in records]
    found = {row["step"]: _values(row, quantity) for row in rows}
    known = {step: values for step, values in sorted(found.items()) if values}
    if not known:
        every = {key for row in rows for module in row["modules"].values() for key in module}
        every |= {key for key in OF_UNITS if any(_values(row, key) for row in rows)}
        have = ", ".join(sorted(every)) or "nothing"
        raise LayerwiseError(f"quantity is {quantity!r}, which none of {len(rows)} records has: they have {have}")
    return list(known), list(known.values())


def _values(row: Mapping[str, Any], quantity: str) -> dict[str, float]:
    of_units = quantity in OF_UNITS
    held = row.get("units", {}) if of_units else row["modules"]
    # a unit whose rate no rule sets has no norm, and a multiplier of 1
    ruled = {n: entry for n, entry in held.items() if not of_units or entry["squared_norm"] or entry["multiplier"] != 1}
    return {name: entry[quantity] for name, entry in ruled.items() if entry.get(quantity) is not None}


def _edges(steps: Sequence[int]) -> Any:
    """Of columns that meet half-way between their steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (np.array(steps[1:]) + np.array(steps[:-1])) / 2
    return np.array([2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]])


def _colours(values: Any, quantity: str) -> dict[str, Any]:
    """The scale of the colours, without the outermost hundredth of the values at either end."""
    from matplotlib.colors import LogNorm, SymLogNorm

    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    low, high = np.percentile(sizes, [1, 99]) if sizes.size else (1.0, 1.0)
    if quantity == "multiplier":
        reach = max(1 / low, high, 1.01)
        return {"norm": LogNorm(1 / reach, reach), "cmap": "RdBu_r"}
    if (values < 0).any():
        return {"norm": SymLogNorm(low, vmin=-high, vmax=high), "cmap": "RdBu_r"}
    return {"norm": LogNorm(low, max(high, low * 1.01)), "cmap": "viridis"}
