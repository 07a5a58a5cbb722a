"""The transfer figure: loss against base learning rate, a panel per method, a curve per size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.lab.experiments.sweep.analysis import Curve
from layerwise.lab.models.family import AXIS_NAMES, Axis
from layerwise.lab.report import style
from layerwise.lab.report.figures.rate_grid import draw_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"standard": "Standard", "flerm": "FLeRM", "uniform": "Uniform", "mup": "1/width (muP, Adam)"}


@dataclass(frozen=True)
class Panels:
    """One row of the figure: the curves of one sweep."""

    title: str
    curves: Sequence[Curve]
    axis: Axis
    ylabel: str


def transfer_figure(rows: Sequence[Panels]) -> Figure:
    """A row of panels per sweep, curves as `draw_losses` draws them; dashed: the base's best rate, carried over."""
    methods = list(dict.fromkeys(curve.method for row in rows for curve in row.curves))
    figure = style.new_figure(style.WIDTH, 0.55 + 1.75 * len(rows))
    grid = figure.subplots(len(rows), len(methods), sharey="row", squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        low, high = _limits(row.curves)
        for method, axes in zip(methods, line, strict=True):
            curves = [curve for curve in row.curves if curve.method == method]
            axes.set_ylim(low, high)
            _panel(axes, curves)
            if row is rows[0]:
                axes.set_title(TITLES.get(method, method))
            if row is rows[-1]:
                axes.set_xlabel("Base learning rate")
        label = f"{row.ylabel}, nats"
        line[0].set_ylabel(f"{row.title}\n{label}" if row.title else label)
        sizes = list(dict.fromkeys(curve.size for curve in row.curves))
        axis = AXIS_NAMES[row.axis]
        line[-1].legend(
            handles=[_entry(size, look) for size, look in _looks(sizes).items()],
            title=axis[0].upper() + axis[1:], loc="upper left", bbox_to_anchor=(1.0, 1.02), handlelength=1.2,
            title_fontsize=8, alignment="left",
        )  # fmt: skip
    return figure


def _looks(sizes: Sequence[float]) -> dict[float, style.Look]:
    """A colour and a marker for each size: far apart for few, shades in order for many."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    colours = [style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE]
    if len(sizes) > len(colours):
        shades = [0.85 * (1 - i / (len(sizes) - 1)) for i in range(len(sizes))]
        colours = [to_hex(mpl.colormaps["viridis"](shade)) for shade in shades]
    looks = map(style.Look, colours, itertools.cycle(style.MARKERS))
    return dict(zip(sizes, looks, strict=False))  # colours and markers to spare


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """From the best loss to the worst of: the loss at a base's best rate, and a little above every curve's best."""
    bests = [curve.mean(curve.best) for curve in curves if curve.best is not None]
    if not bests:
        return 0.0, 1.0
    carried = [
        curve.mean(base.best)
        for base in curves
        for curve in curves
        if curve.method == base.method and base.best is not None and base.best in curve.losses
    ]
    reach = min(curve.ceiling for curve in curves if curve.best is not None)
    shown = [value for value in [*carried, reach] if math.isfinite(value) and value <= 2 * reach]
    low, high = min(bests), max([*shown, *bests])
    margin = 0.08 * (high - low or 1.0)  # one curve, of which nothing but its best is known
    return low - margin, high + 2 * margin


def _panel(axes: Axes, curves: Sequence[Curve]) -> None:
    if not curves:
        axes.set_axis_off()
        return
    rates = [lr for curve in curves for lr in curve.losses]
    axes.set_xscale("log")
    axes.set_xlim(min(rates) / 1.5, max(rates) * 1.5)
    style.plain_log_ticks(axes.xaxis, *axes.get_xlim())
    axes.set_xticks(axes.get_xticks()[::2])
    if curves[0].best is not None:
        axes.axvline(curves[0].best, color=style.MUTED, lw=0.8, ls=(0, (3, 3)), zorder=1)
    looks = _looks([curve.size for curve in curves])
    for curve in curves:
        draw_losses(axes, curve, looks[curve.size], scale=0.65)


def _entry(size: float, look: style.Look) -> object:
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], color=look.color, marker=look.marker, ms=4, label=style.plain(size), markeredgecolor=style.INK, mew=0
    )  # fmt: skip
