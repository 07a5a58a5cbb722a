"""Loss against base learning rate: a curve per optimizer on its grid; how one such curve is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from layerwise.lab.report import style
from layerwise.lab.report.rate_curve import LossesByRate, RateCurve


def loss_against_rate(curves: Sequence[RateCurve], arrangement: style.Arrangement = style.WIDE) -> Figure:
    """Final validation loss on each optimizer's own grid of base rates, all with the same schedule length: dots are seeds,
    the line their mean, the large dot the best rate. An open ring marks an optimum at the end of its grid, which is then no
    optimum; a cross a rate that diverged.
    """
    beside = arrangement.columns > 1
    named = 0.36 * len(curves) + 0.3  # inches: each curve has two lines
    figure = style.new_figure(arrangement.width, max(3.3, named) if beside else 3.3 + named)
    axes = figure.subplots()
    rates = [lr for curve in curves for lr in curve.rates if lr > 0]
    finite = [v for c in curves for values in c.losses.values() for v in values if math.isfinite(v)]
    low, high = _limits(curves, finite)
    axes.set_xscale("log")
    if rates:
        style.log_scale(axes.xaxis, rates, 1.5)
    axes.set_ylim(low, high)
    for curve in curves:
        draw_losses(axes, curve, curve.look)
    legend: dict[str, Any] = {"handles": [_entry(curve) for curve in curves], "handlelength": 1.4, "labelspacing": 0.9}
    if beside:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), **legend)
    else:
        figure.legend(loc="outside lower left", **legend)
    axes.set_xlabel("Base learning rate")
    axes.set_ylabel("Final validation loss, nats")
    return figure


def _limits(curves: Sequence[RateCurve], finite: Sequence[float]) -> tuple[float, float]:
    """From the best loss to a little above the curves' own bests: far worse rates may leave at the top."""
    if not finite:
        return 0.0, 1.0
    bests = [c.mean(c.best) for c in curves if c.best is not None] or [min(finite)]
    low = min(finite)
    reach = max(2.5 * (max(bests) - low), 0.12 * low, 0.05)
    high = min(max(finite), low + reach)
    margin = max(high - low, 0.02) * 0.1
    return low - margin, high + 1.5 * margin


def _entry(curve: RateCurve) -> Line2D:
    best = (
        "diverged at every rate"
        if curve.best is None
        else f"best {curve.best:.3g}{', end of grid' if curve.edge else ''}: {curve.mean(curve.best):.3f}"
    )
    label = f"{style.shortened(curve.label)}\n{best}"
    return Line2D([], [], color=curve.look.color, marker=curve.look.marker, ms=4, label=label)


def draw_losses(axes: Axes, curve: LossesByRate, look: style.Look, scale: float = 1.0) -> None:
    """Dots are seeds, the line their mean, a ring the best rate (open at the end of its grid), a cross at the top a rate
    that diverged. `scale`: of the marks.
    """
    color = look.color
    rates = [lr for lr in curve.rates if math.isfinite(curve.mean(lr))]
    axes.plot(rates, [curve.mean(lr) for lr in rates], color=color, lw=1.4, zorder=3)
    for lr, values in curve.losses.items():
        shown = [v for v in values if math.isfinite(v)]
        axes.plot([lr] * len(shown), shown, look.marker, ms=3.4 * scale, color=color, alpha=0.55, mew=0)
        if len(shown) < len(values):
            top: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot([lr], [1], ls="none", marker="x", ms=6 * scale, color=color, **top)
    if curve.best is not None:
        axes.plot(
            [curve.best], [curve.mean(curve.best)], ls="none", marker="o", ms=8.5 * scale, mec=color, mew=1.5, zorder=6,
            mfc=style.PAPER if curve.edge else color,
        )  # fmt: skip
