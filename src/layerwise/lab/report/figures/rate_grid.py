"""Loss against base learning rate: a curve per optimizer (a tuning grid) or per size of a model (transfer)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from layerwise.lab.report.style import MUTED, PAPER, WIDTH, Look, new_figure, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


@dataclass(frozen=True)
class RateCurve:
    """Final losses on a grid of base rates: `losses[lr]` has one value per seed, infinite or NaN for a diverged run."""

    label: str
    look: Look
    losses: Mapping[float, Sequence[float]]

    def mean(self, lr: float) -> float:
        """Mean over seeds; infinite where any seed diverged or none has finished."""
        values = self.losses[lr]
        return float(np.mean(values)) if values and all(map(math.isfinite, values)) else math.inf

    @property
    def rates(self) -> list[float]:
        return sorted(self.losses)

    @property
    def best(self) -> float | None:
        """The rate of the lowest mean loss; None where every rate diverged."""
        rates = [lr for lr in self.rates if math.isfinite(self.mean(lr))]
        return min(rates, key=self.mean) if rates else None

    @property
    def edge(self) -> str | None:
        """`lowest` or `highest` where the best rate is the end of the grid, so that the optimum may lie beyond it.

        The best of the rates that converged is bracketed from above by one that diverged.
        """
        if self.best is None or len(self.rates) < 2:
            return None
        if self.best == self.rates[0]:
            return "lowest"
        return "highest" if self.best == self.rates[-1] else None


def loss_against_rate(
    curves: Sequence[RateCurve], *, title: str = "", ylabel: str = "Final validation loss"
) -> Figure:
    """One curve each: dots are seeds, the line their mean, a ring the best rate, a cross a rate that diverged.

    An optimum at the end of its grid has an open ring and an arrow that points to where the optimum may be.
    """
    height = max(3.3, 0.36 * len(curves) + 0.3)  # the legend gives each curve two lines
    figure = new_figure(WIDTH, height)
    axes = figure.subplots()
    rates = [lr for curve in curves for lr in curve.rates if lr > 0]
    finite = [v for c in curves for values in c.losses.values() for v in values if math.isfinite(v)]
    low, high = _limits(curves, finite)
    axes.set_xscale("log")
    if rates:
        axes.set_xlim(min(rates) / 1.5, max(rates) * 1.5)
        plain_log_ticks(axes.xaxis, *axes.get_xlim())
    axes.set_ylim(low, high)
    for curve in curves:
        _draw(axes, curve)
    axes.legend(
        handles=[_entry(curve) for curve in curves], loc="upper left", bbox_to_anchor=(1.0, 1.02), handlelength=1.4,
        labelspacing=0.9,
    )  # fmt: skip
    axes.set_xlabel("Base learning rate")
    axes.set_ylabel(f"{ylabel}, nats per token")
    if title:
        axes.set_title(title)
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
    from matplotlib.lines import Line2D

    best = (
        "diverged at every rate"
        if curve.best is None
        else f"best {curve.best:.3g}: {curve.mean(curve.best):.3f}"
    )
    return Line2D(
        [], [], color=curve.look.color, marker=curve.look.marker, ms=4, label=f"{curve.label}\n{best}"
    )


def _draw(axes: Axes, curve: RateCurve) -> None:
    color = curve.look.color
    rates = [lr for lr in curve.rates if math.isfinite(curve.mean(lr))]
    means = [curve.mean(lr) for lr in rates]
    axes.plot(rates, means, color=color, lw=1.5, zorder=3)
    for lr, values in curve.losses.items():
        shown = [v for v in values if math.isfinite(v)]
        axes.plot(
            [lr] * len(shown),
            shown,
            ls="none",
            marker=curve.look.marker,
            ms=3.4,
            color=color,
            alpha=0.55,
            mew=0,
        )
        if len(shown) < len(values):
            axes.annotate(
                "\u00d7",
                (lr, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="center",
                color=color,
                fontsize=11,
            )
    best = curve.best
    if best is None:
        return
    at_edge = curve.edge is not None
    loss = curve.mean(best)
    axes.plot(
        [best],
        [loss],
        marker="o",
        ms=8.5,
        mfc=PAPER if at_edge else color,
        mec=color,
        mew=1.6,
        zorder=6,
        ls="none",
    )
    if at_edge:
        left = curve.edge == "lowest"
        axes.annotate(
            "end of grid", (best, loss), xytext=(-26 if left else 26, -14), textcoords="offset points", fontsize=7,
            color=MUTED, ha="center", va="top",
            arrowprops={"arrowstyle": "<-", "color": MUTED, "lw": 0.8, "shrinkB": 6, "relpos": (0.5, 1)},
        )  # fmt: skip
