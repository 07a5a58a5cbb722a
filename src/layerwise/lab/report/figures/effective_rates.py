"""Effective learning rate of each unit over steps, and how far apart the units of a norm group are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from layerwise.lab.report.names import network_order
from layerwise.lab.report.style import (
    BAND,
    CYCLE,
    MUTED,
    WIDTH,
    label_ends,
    new_figure,
    plain_log_ticks,
    step_axis,
)
from layerwise.lab.runs.recorded import Array, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_KINDS = 13  # names that fit beside a panel
WIDE = 4.0  # spread from which a linear axis would hide the smaller rates
LineStyle = str | tuple[int, tuple[float, float]]
FAMILIES = {
    "spectral": "Spectral norm",
    "sign": "Max-abs norm",
    "sign_per_input": "Max-abs norm, per input",
    "vector_rms": "Vectors (RMS norm)",
    "row_norm": "Row norm",
    "col_norm": "Column norm",
    "frobenius": "Frobenius norm",
}


def effective_rates(run: Run) -> Figure:
    """A row of panels per norm group: the rate of each unit, and what it is of the base rate (the multiplier).

    A thin line is a unit, its colour the kind of tensor, and the band reaches from the group's lowest to its highest.
    Groups in which no unit's rate differs from another's are left out, unless that leaves none.
    """
    history = run.history
    assert history is not None
    row_of = {unit: i for i, unit in enumerate(history.units)}
    groups: dict[str, dict[int, str]] = {}  # norm group -> {row of the history: kind of tensor}
    for name in network_order(history.units, [str(row["name"]) for row in run.parameters]):
        row = row_of[name.unit]
        if np.isfinite(history.lr[row]).any():
            groups.setdefault(run.norm_groups.get(name.unit.split("[", 1)[0], ""), {})[row] = name.part
    spread = {
        group: rows for group, rows in groups.items() if _largest_ratio(history.lr[list(rows)]) > 1.0005
    }
    shown = sorted((spread or groups).items(), key=lambda item: item[0] == "vector_rms")
    height = 2.25
    figure = new_figure(WIDTH, height * len(shown) + 0.1)
    panels: Any = figure.subplots(len(shown), 2, squeeze=False, sharex=True)
    for (left, right), (group, kinds) in zip(panels, shown, strict=True):
        rows = list(kinds)
        styles = _styles(list(kinds.values()))
        _band(left, history.steps, history.lr[rows], [styles[k] for k in kinds.values()])
        _band(right, history.steps, history.multiplier[rows], [styles[k] for k in kinds.values()])
        if _largest_ratio(history.multiplier[rows]) > WIDE:
            _log_scale(right, history.multiplier[rows])
        left.set_title(FAMILIES.get(group, group) or "All units")
        left.set_title(f"{len(rows)} units" if len(rows) > 1 else "1 unit", **_NOTE)
        right.set_title(f"spread at most {_largest_ratio(history.lr[rows]):.2f}\u00d7", **_NOTE)
        left.set_ylabel("Effective learning rate")
        right.set_ylabel("Rate multiplier")
        left.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        left.yaxis.get_offset_text().set_visible(False)
        _name_scale(left)
        if len(styles) <= MOST_KINDS:
            ends = [
                (float(history.steps[-1]), _typical(history.multiplier[members]), kind, color)
                for kind, (color, _) in styles.items()
                if (members := [row for row in rows if kinds[row] == kind])
            ]
            label_ends(right, ends, height=height * 0.72, size=7.2 if len(ends) <= 9 else 6.5)
    for axes in panels[-1]:
        step_axis(axes)
    return figure


_NOTE: dict[str, Any] = {"loc": "right", "fontsize": 7.5, "color": MUTED, "fontweight": "normal"}


def _styles(kinds: list[str]) -> dict[str, tuple[str, LineStyle]]:
    """Colour and line style of each kind: dashed where the colours come round again, grey where there are too many."""
    distinct = list(dict.fromkeys(kinds))
    if len(distinct) > MOST_KINDS:
        return dict.fromkeys(distinct, (MUTED, "-"))
    n = len(CYCLE)
    return {kind: (CYCLE[i % n], "-" if i < n else (0, (4, 1.5))) for i, kind in enumerate(distinct)}


def _band(axes: Axes, steps: Array, values: Array, styles: list[tuple[str, LineStyle]]) -> None:
    present = np.isfinite(values).any(axis=0)
    x, values = steps[present], values[:, present]
    axes.fill_between(x, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=BAND, alpha=0.4, lw=0)
    for line, (color, style) in zip(values, styles, strict=True):
        axes.plot(x, line, color=color, ls=style, lw=0.9, alpha=0.8 if len(values) <= 60 else 0.4)
    if len(x) > 1:
        axes.set_xlim(x[0], x[-1])
    axes.set_ylim(0, float(np.nanmax(values)) * 1.06 or 1.0)


def _log_scale(axes: Axes, values: Array) -> None:
    positive = values[np.isfinite(values) & (values > 0)]
    axes.set_yscale("log")
    low, high = float(positive.min()) / 1.2, float(positive.max()) * 1.2
    axes.set_ylim(low, high)
    plain_log_ticks(axes.yaxis, low, high)


def _name_scale(axes: Axes) -> None:
    """Move the power of ten from above the axis, where the title stands, into the axis label."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    scale = axes.yaxis.get_offset_text().get_text()
    if scale:
        power = scale.replace("\u00d7", "").replace("\\times", "")
        axes.set_ylabel(f"{axes.get_ylabel()}, {power}")


def _typical(values: Array) -> float:
    """The geometric mean of the last values of the rows, those that are positive."""
    last = [row[np.isfinite(row)][-1] for row in values if np.isfinite(row).any()]
    return float(np.exp(np.mean([np.log(v) for v in last if v > 0] or [0.0])))


def _largest_ratio(rates: Array) -> float:
    """The largest ratio of highest to lowest positive rate at one step; 1 where there is none."""
    positive = np.where(rates > 0, rates, np.nan)
    known = np.isfinite(positive).any(axis=0)
    if not known.any():
        return 1.0
    return float(np.max(np.nanmax(positive[:, known], axis=0) / np.nanmin(positive[:, known], axis=0)))
