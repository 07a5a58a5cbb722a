"""Function-space learning rates over a run: how much each layer's updates change the network's outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from layerwise.lab.report.names import UnitName, network_order
from layerwise.lab.report.style import CYCLE, MUTED, PAPER, WIDTH, label_ends, new_figure, step_axis
from layerwise.lab.runs.recorded import Array, Run, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_KINDS = 8


def rate_per_layer(run: Run) -> Figure:
    """Function-space rate of each parameter over steps (log scale), coloured by kind of tensor."""
    steps, names, values = _records(run, "value")
    figure = new_figure(WIDTH * 0.86, 3.3)
    axes = figure.subplots()
    colors = _colors(names)
    axes.set_yscale("log")
    for name, line in zip(names, values, strict=True):
        axes.plot(
            steps, np.where(line > 0, line, np.nan), color=colors.get(name.part, MUTED), lw=0.9, alpha=0.8
        )
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size:
        axes.set_ylim(positive.min() / 1.3, positive.max() * 1.3)
    if len(steps) > 1:
        axes.set_xlim(steps[0], steps[-1])
    step_axis(axes)
    axes.set_ylabel("Function-space learning rate")
    ends = []
    for part, color in colors.items():
        members = [i for i, name in enumerate(names) if name.part == part]
        last = [
            v[np.isfinite(v) & (v > 0)][-1]
            for i in members
            if (v := values[i])[np.isfinite(v) & (v > 0)].size
        ]
        if last:
            ends.append((float(steps[-1]), float(np.exp(np.mean(np.log(last)))), part, color))
    label_ends(axes, ends, height=2.5, size=7.2)
    return figure


def stacked_shares(run: Run) -> Figure:
    """Shares of the total function-space rate over steps, stacked: by block (left) and by kind of tensor (right)."""
    steps, names, values = _records(run, "share")
    figure = new_figure(WIDTH, 2.9)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, keys in (
        (panels[0], "By block", [name.block or name.part for name in names]),
        (panels[1], "By kind of tensor", [name.part for name in names]),
    ):
        order = list(dict.fromkeys(keys))
        sums = np.array([np.nansum(values[[k == key for k in keys]], axis=0) for key in order])
        colors = _shades(len(order)) if len(order) > MOST_KINDS else list(CYCLE[: len(order)])
        axes.stackplot(steps, sums, colors=colors, linewidth=0.4, edgecolor=PAPER, alpha=0.85)
        axes.set_ylim(0, 1)
        if len(steps) > 1:
            axes.set_xlim(steps[0], steps[-1])
        step_axis(axes)
        axes.set_title(title)
        middles = np.cumsum(sums[:, -1]) - sums[:, -1] / 2
        ends = [(float(steps[-1]), float(m), k, c) for k, m, c in zip(order, middles, colors, strict=True)]
        largest = sorted(range(len(ends)), key=lambda i: -sums[i, -1])[:14]
        label_ends(axes, [ends[i] for i in sorted(largest)], height=2.2, size=7)
    panels[0].set_ylabel("Share of the function-space rate")
    return figure


def _records(run: Run, field: str) -> tuple[Array, list[UnitName], Array]:
    """Steps `[T]`, parameters in network order, and one field `[parameters, T]`, NaN where it was not measured."""
    lines = run.function_space
    names = network_order(
        dict.fromkeys(p for line in lines for p in line.get("rates") or ()),
        [str(r["name"]) for r in run.parameters],
    )
    values = [
        [number(((line.get("rates") or {}).get(n.unit) or {}).get(field)) for line in lines] for n in names
    ]
    return np.array([number(line["step"]) for line in lines]), names, np.array(values, dtype=np.float64)


def _colors(names: list[UnitName]) -> dict[str, str]:
    """A colour for each kind that occurs most; the rest stay grey and unnamed."""
    kinds = [name.part for name in names]
    common = sorted(dict.fromkeys(kinds), key=lambda k: -kinds.count(k))[:MOST_KINDS]
    return dict(zip([k for k in dict.fromkeys(kinds) if k in common], CYCLE, strict=False))


def _shades(n: int) -> list[str]:
    """Colours in order of depth."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    return [to_hex(mpl.colormaps["viridis"](0.05 + 0.75 * i / max(n - 1, 1))) for i in range(n)]
