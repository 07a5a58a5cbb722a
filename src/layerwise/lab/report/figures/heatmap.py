"""Layer by step: what a rule measures, and the multiplier it makes of that, for all units in network order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from layerwise.common.layer_rate import parameter_of
from layerwise.lab.config.keys import flatten
from layerwise.lab.optimizers.registry import optimizers
from layerwise.lab.report import style
from layerwise.lab.report.figures.units import UnitName, network_order
from layerwise.lab.runs.recorded import Array, LayerHistory, Run

MANY_ROWS = 46  # above this the rows are named by block
ROW = 0.135  # inches
TALLEST = 7.6  # inches
MIN_BLOCK = 8  # points
COLUMNS = 400  # steps drawn: more than a page has pixels for are thinned


def measured(run: Run) -> str:
    """What the run's rate rule measures of a unit, and records as its squared norm."""
    rule = flatten(run.config).get("optimizer.rates.rule") or getattr(optimizers().get(run.optimizer), "rule", None)
    return "Squared dual norm" if rule == "dual_norm_adaptive" else "Gradient noise"


def layer_heat_maps(run: Run, units: Sequence[str], arrangement: style.Arrangement = style.WIDE) -> Figure:
    """What the rate rule measures of each unit, on a log scale, over the median of its norm group (it is measured in the
    dual norm of the group, so only the ratio can be compared between groups), and the multiplier on the base learning rate;
    rows from the input of the network to its output. Parameters whose rates no rule sets are left out.
    """
    history = run.history
    assert history is not None
    names = network_order(units, [str(row["name"]) for row in run.parameters])
    rows = [history.units.index(name.unit) for name in names]
    groups = [run.norm_groups.get(parameter_of(name.unit), "") for name in names]
    steps = len(history.steps)
    pick = np.unique(np.linspace(0, steps - 1, min(steps, COLUMNS)).round().astype(int))
    norms = relative_norms(history, rows, groups)[:, pick]
    shown: list[tuple[Array, str, str]] = []
    if history.has_norms:
        shown.append((norms, measured(run), "relative to the norm group's median"))
    if history.has_multiplier:
        shown.append((history.multiplier[rows][:, pick], "Rate multiplier", "factor on the base rate"))
    body = min(max(len(rows) * ROW, 1.0), TALLEST)
    width = arrangement.width if len(shown) > 1 else min(arrangement.width, 0.62 * style.WIDTH)
    figure = style.new_figure(width, arrangement.height(len(shown), body + 1.3))
    columns = arrangement.panels(figure, len(shown), sharey=True)
    for axes, (values, title, subtitle) in zip(columns, shown, strict=True):
        image = _image(axes, values, history.steps[pick], is_norm=values is norms)
        bar = figure.colorbar(image, ax=axes, location="top", pad=0.02, aspect=34, extend=_clipped(image, values))
        _scale_bar(bar, title, subtitle)
        style.step_axis(axes, history.steps[pick])
        _separators(axes, names)
    for axes in columns[:: arrangement.columns]:
        _row_labels(axes, names, body)
    return figure


def _scale_bar(bar: Any, title: str, subtitle: str) -> None:
    """What the colours above a heat map mean."""
    if isinstance(bar.norm, LogNorm) and bar.norm.vmin and bar.norm.vmax:
        style.plain_log_ticks(bar.ax.xaxis, bar.norm.vmin, bar.norm.vmax)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=7.5, pad=1)
    bar.ax.set_title(subtitle, loc="left", fontsize=7.5, color=style.MUTED, fontweight="normal", pad=15)
    bar.ax.annotate(
        title, (0, 1), xycoords="axes fraction", xytext=(0, 26), textcoords="offset points", fontsize=9, fontweight="bold",
    )  # fmt: skip


def relative_norms(history: LayerHistory, rows: Sequence[int], groups: Sequence[str]) -> Array:
    """What was measured of the chosen rows over the median of its norm group (all its units, all steps); NaN for zero."""
    norms = history.squared_norm[list(rows)].copy()
    norms[~(norms > 0)] = np.nan
    for group in set(groups):
        members = [i for i, name in enumerate(groups) if name == group]
        values = norms[members]
        if np.isfinite(values).any():
            norms[members] = values / np.nanmedian(values)
    return norms


def _clipped(image: Any, values: Array) -> str:
    """Which ends of the colour scale stand for more than their value."""
    if not np.isfinite(values).any():  # multipliers without norms: static ones
        return "neither"
    low = np.nanmin(values) < image.norm.vmin * (1 - 1e-9)
    high = np.nanmax(values) > image.norm.vmax * (1 + 1e-9)
    return "both" if low and high else "min" if low else "max" if high else "neither"


def _image(axes: Axes, values: Array, steps: Array, *, is_norm: bool) -> Any:
    finite = values[np.isfinite(values)]
    norm: Any
    if is_norm:
        low, high = np.percentile(finite, [1, 99]) if finite.size else (0.1, 10.0)
        norm, colors = LogNorm(min(low, 0.8), max(high, 1.25)), style.NORM_MAP
    elif finite.size and finite.max() > 1 + 1e-6:
        # Rules that also raise rates: blue below one, red above it.
        reach = max(finite.max(), 1.01)
        norm, colors = TwoSlopeNorm(1.0, min(finite.min(), 0.99), reach), "RdBu_r"
    else:
        low = float(finite[finite > 0].min()) if (finite > 0).any() else 0.0
        linear = low > 0.25 or low == 0  # below, a linear scale would have one colour for all small rates
        norm = Normalize(min(np.floor(low * 10) / 10, 0.9), 1.0) if linear else LogNorm(low, 1.0)
        colors = style.RATE_MAP
    edges = np.concatenate([[steps[0]], (steps[1:] + steps[:-1]) / 2, [steps[-1]]])
    if len(steps) == 1:
        edges = np.array([steps[0] - 0.5, steps[0] + 0.5])
    mesh = axes.pcolormesh(edges, np.arange(len(values) + 1), values, norm=norm, cmap=colors, rasterized=True)
    axes.set_ylim(len(values), 0)
    axes.set_xlim(edges[0], edges[-1])
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return mesh


def _blocks(names: Sequence[UnitName]) -> list[tuple[str, int, int]]:
    """(block, first row, row after the last) of each run of rows of the same block."""
    spans = [(block, [*rows]) for block, rows in groupby(range(len(names)), key=lambda row: names[row].block)]
    return [(block, rows[0], rows[-1] + 1) for block, rows in spans]


def _separators(axes: Axes, names: Sequence[UnitName]) -> None:
    spans = _blocks(names)
    points = 72 * min(len(names) * ROW, TALLEST) / len(spans)  # height of a block
    if points < MIN_BLOCK:  # lines would cover what they part
        return
    for _, first, _ in spans[1:]:
        axes.axhline(first, color=style.PAPER, lw=min(1.6, 0.06 * points))


def _row_labels(axes: Axes, names: Sequence[UnitName], height: float) -> None:
    """Each row named, its block at the far left; with many rows, blocks alone, and of those as many as fit."""
    spans = _blocks(names)
    if len(names) <= MANY_ROWS:
        axes.set_yticks(np.arange(len(names)) + 0.5, [name.part for name in names], fontsize=7)
        widest = max(len(name.part) for name in names)
        for block, first, end in spans:
            if block:
                axes.annotate(
                    block, (0, (first + end) / 2), xycoords=("axes fraction", "data"), xytext=(-8 - 4.0 * widest, 0),
                    textcoords="offset points", ha="right", va="center", fontsize=7.5, fontweight="bold", color=style.INK,
                )  # fmt: skip
        return
    room = max(int(height / 0.135), 4)
    every = -(-len(spans) // room)
    ticks, labels = [], []
    for i, (block, first, end) in enumerate(spans):
        if i % every == 0 or not block:
            ticks.append((first + end) / 2)
            labels.append(block or (names[first].part if end - first == 1 else f"{names[first].part} +{end - first - 1}"))
    axes.set_yticks(ticks, labels, fontsize=7)
