"""Function-space learning rates over a run: how much each layer's updates change the network's outputs."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerwise.lab.report import style
from layerwise.lab.report.figures.units import UnitName, draw_kinds, name_kinds, network_order
from layerwise.lab.runs.recorded import Array, Run, number

MOST_KINDS = 8


def rate_per_layer(run: Run, arrangement: style.Arrangement = style.WIDE) -> Figure:
    """Function-space learning rate of each parameter: how much one update of it alone changes the outputs of the network.
    Log scale; of each kind of tensor the median, the range shaded, and a thin line per parameter. The kinds of the largest
    rates have names and colours, the others are grey.
    """
    steps, names, values = _records(run, "value")
    kinds = [name.part for name in names]
    values = np.where(values > 0, values, np.nan)
    figure = style.new_figure(arrangement.width, 3.3)
    axes = figure.subplots()
    axes.set_yscale("log")
    largest = {kind: np.nanmax(values[[k == kind for k in kinds]], initial=0.0) for kind in kinds}
    named = sorted(largest, key=largest.__getitem__, reverse=True)[:MOST_KINDS]
    draw_kinds(axes, steps, values, kinds, named)
    if np.isfinite(values).any():
        style.log_scale(axes.yaxis, values[np.isfinite(values)], 1.3)
    style.step_axis(axes, steps)
    axes.set_ylabel("Function-space learning rate")
    name_kinds(axes, steps, values, kinds, 2.5, named)
    return figure


def stacked_shares(run: Run, arrangement: style.Arrangement = style.WIDE) -> Figure:
    """Share of each block, and of each kind of tensor, in the sum of these rates."""
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
    colors = list(style.CYCLE[: len(order)])
    if len(order) > MOST_KINDS:
        colors = style.shades(0.05 + 0.75 * i / (len(order) - 1) for i in range(len(order)))
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
        dict.fromkeys(p for line in lines for p in line.get("rates") or ()), [str(r["name"]) for r in run.parameters]
    )
    values = [[number(((line.get("rates") or {}).get(n.unit) or {}).get(field)) for line in lines] for n in names]
    return np.array([number(line.get("step")) for line in lines]), names, np.array(values, dtype=np.float64)
