"""Losses: against tokens and time, a line per contender; against the base rate, a curve per optimizer on its grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import gaussian_filter1d

from layerwise.common.text_table import count
from layerwise.lab.report import style
from layerwise.lab.report.grouping import Contender, LossesByRate, RateCurve, standing_out
from layerwise.lab.runs.recorded import Array, Series

HEIGHT = 3.1  # inches of a panel
SPAN = 0.03


def loss_curves(contenders: Sequence[Contender], arrangement: style.Arrangement = style.WIDE) -> Figure:
    """Training loss (line, smoothed; the raw values behind it) and validation loss (markers), against training tokens or
    images and against training time. Losses of the first fifth, and of runs that diverged, may lie above the axis. Lighter
    lines are further seeds; of more than a dozen contenders the best are named, the others grey.
    """
    figure = style.new_figure(arrangement.width, arrangement.height(2, HEIGHT) + 0.25)
    by_tokens, by_time = arrangement.panels(figure, 2, sharey=True)
    low, high = loss_limits(contenders)
    named = standing_out(contenders)
    counted = " or ".join(sorted({run.counted for c in contenders for run in c.runs}))
    for axes, x_of, label, title in (
        (by_tokens, lambda s: s.tokens, f"Training {counted}", f"a   Loss against {counted}"),
        (by_time, lambda s: s.seconds, "Training time", "b   Loss against time"),
    ):
        lengths = [_draw_contender(axes, c, x_of, c in named) for c in contenders]
        axes.set_ylim(low, high)
        axes.set_xlim(0, max(lengths) * 1.015 or 1.0)
        axes.set_xlabel(label)
        axes.set_ylabel("Loss, nats" if axes is by_tokens or arrangement.columns == 1 else "")
        axes.set_title(title)
    by_tokens.xaxis.set_major_locator(MaxNLocator(5))
    by_tokens.xaxis.set_major_formatter(lambda x, _: count(x))
    _time_axis(by_time)
    ends = [(*_end(c.runs[0].val_loss, c.runs[0].train_loss), style.shortened(c.label, 30), c.look.color) for c in named]
    style.label_ends(by_tokens, [e for e in ends if math.isfinite(e[1])], height=HEIGHT * 0.72)
    _key(figure, len(contenders) - len(named))
    return figure


def loss_limits(contenders: Sequence[Contender]) -> tuple[float, float]:
    """Limits that show the part of training where contenders differ, not the fall from the first loss.

    The top is the highest smoothed loss after a fifth of the run. Runs that diverged count where there are no others.
    """
    lows: list[float] = []
    highs: list[float] = []
    runs = [run for contender in contenders for run in contender.runs]
    for run in [run for run in runs if run.status != "diverged"] or runs:
        for series, values in ((run.val_loss, run.val_loss.values), (run.train_loss, smooth(run.train_loss.values))):
            late = values[series.steps >= 0.2 * series.steps[-1]] if len(series) else values
            late = late[np.isfinite(late)]
            if late.size:
                lows.append(float(late.min()))
                highs.append(float(late[0] if run.status != "diverged" else np.median(late)))
    if not lows:
        return 0.0, 1.0
    low, high = min(lows), max(highs)
    margin = max(high - low, 0.02) * 0.06
    return low - margin, high + margin


def smooth(values: Array) -> Array:
    """A straight line fitted around each point with Gaussian weights, of deviation `SPAN` of the run's points.

    A fitted line neither lags behind a falling loss nor bends at the ends, as averages do. What is not finite is left
    out, and stays NaN where it stands.
    """
    at, finite = np.arange(len(values), dtype=np.float64), np.isfinite(values)
    known, deviation = np.where(finite, values, 0.0), max(SPAN * len(values), 1.0)
    weighted = [
        gaussian_filter1d(sums, deviation, mode="constant", truncate=8.0)
        for sums in (finite.astype(np.float64), finite * at, finite * at**2, known, known * at)
    ]
    weight = np.where(finite, weighted[0], np.nan)
    x, xx, y, xy = (sums / weight for sums in weighted[1:])
    variance = xx - x * x
    slope = np.where(variance > 1e-9, (xy - x * y) / np.maximum(variance, 1e-9), 0.0)
    return y + slope * (at - x)


def _draw_contender(axes: Axes, contender: Contender, x_of: Callable[[Series], Array], named: bool) -> float:
    """Draw one contender's runs; returns where the longest ends, 0 where there is nothing to draw."""
    color = contender.look.color if named else style.BAND
    ends = [0.0]
    several = len(contender.runs) > 1
    for i, run in enumerate(contender.runs):
        faint = 0.35 if i else 1.0
        train, val = run.train_loss, run.val_loss
        if len(train):
            if named and not several and len(train) > 40:
                axes.plot(x_of(train), train.values, color=color, alpha=0.16, lw=0.6, zorder=1)
            width, over = (1.5, 3) if named else (0.7, 2)
            smoothed = smooth(train.values)
            alone = "_" if np.isfinite(smoothed).sum() == 1 else ""  # as a line has no length then
            axes.plot(x_of(train), smoothed, color=color, lw=width, marker=alone, alpha=0.9 * faint, zorder=over)
            ends.append(float(x_of(train)[-1]))
        if len(val):
            size = 4.6 if named else 2.0
            axes.plot(
                x_of(val), val.values, linestyle="none", marker=contender.look.marker, ms=size, mfc=color,
                mec=style.PAPER, mew=0.7 if named else 0, alpha=faint, zorder=5 if named else 2, clip_on=True,
            )  # fmt: skip
            ends.append(float(x_of(val)[-1]))
        if run.status == "diverged" and np.isfinite(train.values).any():
            axes.annotate(
                "diverged", (float(x_of(train)[np.isfinite(train.values)][-1]), 0.97), color=color, fontsize=7,
                xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top",
            )  # fmt: skip
    return max(ends)


def _end(val: Series, train: Series) -> tuple[float, float]:
    series = val if len(val) else train
    finite = np.isfinite(series.values)
    if not finite.any():
        return math.nan, math.nan
    return float(series.tokens[finite][-1]), float(series.values[finite][-1])


def _key(figure: Figure, grey: int) -> None:
    """What a line and what a marker is, in words, below the panels."""
    handles = [
        Line2D([], [], color=style.MUTED, lw=1.5, label="training, smoothed"),
        Line2D([], [], color=style.MUTED, marker="o", ls="none", ms=4.6, mec=style.PAPER, label="validation"),
    ]
    if grey:
        handles.append(Line2D([], [], color=style.BAND, lw=1.5, label=f"{grey} more"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.6)


def _time_axis(axes: Axes) -> None:
    span = axes.get_xlim()[1]
    units = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    unit, name = next((unit for unit in units if span > 2.5 * unit[0]), units[-1])
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 3, 5, 6, 10]))
    if unit > 1:
        step = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, span / unit)
        axes.set_xticks([t * unit for t in step if t * unit <= span])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / unit:g}")
    axes.set_xlabel(f"{axes.get_xlabel()}, {name}")


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
