"""Function-space learning rates over a run: how much each layer's updates change the network's outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from layerwise.lab.report import style
from layerwise.lab.report.figures.by_kind import draw_kinds, kind_styles, name_kinds
from layerwise.lab.report.names import UnitName, network_order
from layerwise.lab.runs.recorded import Array, Run, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_KINDS = 8


def rate_per_layer(run: Run, arrangement: style.Arrangement = style.WIDE) -> Figure:
    """Function-space rate of each parameter over steps (log scale), coloured by kind of tensor."""
    steps, names, values = _records(run, "value")
    kinds = [name.part for name in names]
    values = np.where(values > 0, values, np.nan)
    figure = style.new_figure(arrangement.width, 3.3)
    axes = figure.subplots()
    axes.set_yscale("log")
    styles = kind_styles(kinds, MOST_KINDS)
    draw_kinds(axes, steps, values, kinds, styles)
    if np.isfinite(values).any():
        low, high = float(np.nanmin(values)) / 1.3, float(np.nanmax(values)) * 1.3
        axes.set_ylim(low, high)
        style.plain_log_ticks(axes.yaxis, low, high)
    style.step_axis(axes, steps)
    axes.set_ylabel("Function-space learning rate")
    name_kinds(axes, steps, values, kinds, styles, height=2.5)
    return figure


def stacked_shares(run: Run, arrangement: style.Arrangement = style.WIDE) -> Figure:
    """Shares of the total function-space rate over steps, stacked: by block, and by kind of tensor."""
    steps, names, values = _records(run, "share")
    figure = style.new_figure(arrangement.width, arrangement.height(2, 2.9))
    for axes, title, keys in zip(
        arrangement.panels(figure, 2, sharey=True),
        ("By block", "By kind of tensor"),
        ([name.block or name.part for name in names], [name.part for name in names]),
        strict=True,
    ):
        _stack(axes, steps, values, keys)
        axes.set_title(title)
    figure.axes[0].set_ylabel("Share of the function-space rate")
    return figure


def _stack(axes: Axes, steps: Array, values: Array, keys: list[str]) -> None:
    order = list(dict.fromkeys(keys))
    sums = np.array([np.nansum(values[[k == key for k in keys]], axis=0) for key in order])
    colors = _shades(len(order)) if len(order) > MOST_KINDS else list(style.CYCLE[: len(order)])
    x = steps if len(steps) > 1 else np.array([steps[0] - 0.3, steps[0] + 0.3])  # one step is a bar
    drawn = sums if len(steps) > 1 else np.repeat(sums, 2, axis=1)
    axes.stackplot(x, drawn, colors=colors, linewidth=0.4, edgecolor=style.PAPER, alpha=0.85)
    axes.set_ylim(0, 1)
    style.step_axis(axes, steps)
    middles = np.cumsum(sums[:, -1]) - sums[:, -1] / 2
    named = [color if color in style.CYCLE else style.INK for color in colors]  # shades are too dark to read on a dark page
    ends = [(float(steps[-1]), float(m), k, c) for k, m, c in zip(order, middles, named, strict=True)]
    largest = sorted(range(len(ends)), key=lambda i: -sums[i, -1])[:14]
    style.label_ends(axes, [ends[i] for i in sorted(largest)], height=2.2, size=7)


def _records(run: Run, field: str) -> tuple[Array, list[UnitName], Array]:
    """Steps `[T]`, parameters in network order, and one field `[parameters, T]`, NaN where it was not measured."""
    lines = run.function_space
    names = network_order(
        dict.fromkeys(p for line in lines for p in line.get("rates") or ()),
        [str(r["name"]) for r in run.parameters],
    )
    values = [[number(((line.get("rates") or {}).get(n.unit) or {}).get(field)) for line in lines] for n in names]
    return np.array([number(line.get("step")) for line in lines]), names, np.array(values, dtype=np.float64)


def _shades(n: int) -> list[str]:
    """Colours in order of depth."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    return [to_hex(mpl.colormaps["viridis"](0.05 + 0.75 * i / max(n - 1, 1))) for i in range(n)]
