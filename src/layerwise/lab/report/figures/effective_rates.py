"""Effective learning rate of each unit over steps, and how far apart the units of a norm group are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerwise.common.layer_rate import parameter_of
from layerwise.lab.report import style
from layerwise.lab.report.figures.units import commonest, draw_kinds, name_kinds, network_order
from layerwise.lab.runs.recorded import Array, Run

FAR_APART = 4.0  # spread from which a linear axis would hide the smaller rates
FAMILIES = {
    "spectral": "Spectral norm",
    "sign": "Max-abs norm",
    "sign_per_input": "Max-abs norm, per input",
    "vector_rms": "Vectors (RMS norm)",
    "row_norm": "Row norm",
    "col_norm": "Column norm",
    "frobenius": "Frobenius norm",
}
HEIGHT = 2.25  # inches of a panel


def effective_rates(run: Run, arrangement: style.Arrangement = style.WIDE) -> Figure:
    """Effective learning rate and rate multiplier, coloured by kind of tensor: of each kind the median, the range shaded,
    and a thin line per unit. Norm groups in which no unit's rate differs from another's are left out, unless that leaves
    none. A name stands where the median of its units ends.
    """
    history = run.history
    assert history is not None
    row_of = {unit: i for i, unit in enumerate(history.units)}
    groups: dict[str, dict[int, str]] = {}  # norm group -> {row of the history: kind of tensor}
    for name in network_order(history.units, [str(row["name"]) for row in run.parameters]):
        row = row_of[name.unit]
        if np.isfinite(history.lr[row]).any():
            groups.setdefault(run.norm_groups.get(parameter_of(name.unit), ""), {})[row] = name.kind
    spread = {group: rows for group, rows in groups.items() if _largest_ratio(history.lr[list(rows)]) > 1.0005}
    shown = sorted((spread or groups).items(), key=lambda item: item[0] == "vector_rms")
    figure = style.new_figure(arrangement.width, arrangement.height(2 * len(shown), HEIGHT) + 0.1)
    panels = arrangement.panels(figure, 2 * len(shown))
    for number, (group, kinds) in enumerate(shown):
        rows, names = list(kinds), list(kinds.values())
        _rates(panels[2 * number], history.steps, history.lr[rows], names)
        panels[2 * number].set_title(FAMILIES.get(group, group) or "All units")
        _multipliers(panels[2 * number + 1], history.steps, history.multiplier[rows], names)
        panels[2 * number + 1].set_title(f"spread at most {_largest_ratio(history.lr[rows]):.2f}\u00d7", **_NOTE)
    for axes in panels[: -arrangement.columns]:
        axes.set_xlabel("")
    return figure


_NOTE: dict[str, Any] = {"loc": "right", "fontsize": 7.5, "color": style.MUTED, "fontweight": "normal"}


def _rates(axes: Axes, steps: Array, values: Array, kinds: list[str]) -> None:
    draw_kinds(axes, steps, values, kinds, commonest(kinds))
    top = float(np.nanmax(values)) * 1.06 or 1.0
    axes.set_ylim(0, top)
    exponent = math.floor(math.log10(top))
    scale = 1.0 if -2 <= exponent < 3 else 10.0**exponent
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / scale:g}")
    axes.set_ylabel("Effective learning rate" + ("" if scale == 1 else f", {style.power_of_ten(exponent)}"))
    axes.set_title(f"{len(values)} units" if len(values) > 1 else "1 unit", **_NOTE)
    style.step_axis(axes, steps)


def _multipliers(axes: Axes, steps: Array, values: Array, kinds: list[str]) -> None:
    draw_kinds(axes, steps, values, kinds, commonest(kinds))
    if _largest_ratio(values) > FAR_APART:
        style.log_scale(axes.yaxis, values[np.isfinite(values) & (values > 0)], 1.2)
    else:
        axes.set_ylim(0, float(np.nanmax(values)) * 1.06 or 1.0)
    axes.set_ylabel("Rate multiplier")
    style.step_axis(axes, steps)
    name_kinds(axes, steps, values, kinds, HEIGHT * 0.72, commonest(kinds))


def _largest_ratio(rates: Array) -> float:
    """The largest ratio of highest to lowest positive rate at one step; 1 where there is none."""
    positive = np.where(rates > 0, rates, np.nan)
    known = np.isfinite(positive).any(axis=0)
    if not known.any():
        return 1.0
    return float(np.max(np.nanmax(positive[:, known], axis=0) / np.nanmin(positive[:, known], axis=0)))
