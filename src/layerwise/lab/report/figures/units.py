"""Units of a network over steps, told apart by kind of tensor: their short names, their order, their lines; their effective
learning rates, and their function-space rates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerwise.common.layer_rate import parameter_of
from layerwise.lab.report import style
from layerwise.lab.runs.recorded import Array, Run, number

MOST_KINDS = 13  # names that fit beside a panel
FEW = 8  # lines that need no median to be told apart
MOST_COLOURS = 8
FAR_APART = 4.0  # spread from which a linear axis would hide the smaller rates
HEIGHT = 2.25  # inches of a panel
FAMILIES = {
    "spectral": "Spectral norm",
    "sign": "Max-abs norm",
    "sign_per_input": "Max-abs norm, per input",
    "vector_rms": "Vectors (RMS norm)",
    "row_norm": "Row norm",
    "col_norm": "Column norm",
    "frobenius": "Frobenius norm",
}
_NOTE: dict[str, Any] = {"loc": "right", "fontsize": 7.5, "color": style.MUTED, "fontweight": "normal"}
LineStyle = str | tuple[int, tuple[float, float]]


@dataclass(frozen=True)
class UnitName:
    """A unit's place in the network: `transformer.h.3.mlp.c_fc.weight` is block `h.3`, part `mlp.c_fc`."""

    unit: str
    block: str  # "h.3", or "" outside the blocks
    part: str  # "mlp.c_fc", "attn.c_attn q", "ln_1 bias"

    @property
    def kind(self) -> str:
        """The part without a number: the experts of a stack, and the heads of an attention, are of one kind."""
        return re.sub(r" \d+(,|$)", lambda found: " " if found[1] else "", self.part)


_PREFIX = re.compile(r"^(_orig_mod\.|module\.|base_model\.|model\.|transformer\.|gpt_neox\.)+")
_BLOCK = re.compile(r"^(?P<block>(?:[A-Za-z_]\w*\.)*?(?P<stack>[A-Za-z_]\w*)\.(?P<index>\d+))\.(?P<part>.+)$")


def unit_name(unit: str) -> UnitName:
    """Parse a unit's name into block and part, without what says nothing (`transformer.`, `.weight`)."""
    name, _, index = unit.removesuffix("]").partition("[")
    name = _PREFIX.sub("", name)
    block = ""
    found = _BLOCK.match(name)
    if found:
        stack = found["block"].split(".")
        block, name = ".".join(stack[-2:]), found["part"]
    name = re.sub(r"\.bias$", " bias", re.sub(r"(\.default)?\.weight$", "", name))
    return UnitName(unit, block, f"{name} {index}" if index else name)


def network_order(units: Iterable[str], parameters: Sequence[str]) -> list[UnitName]:
    """Units from the input of the network to its output: in the order of `parameters`, which is the model's."""
    rank = {name: number for number, name in enumerate(parameters)}
    return [unit_name(unit) for unit in sorted(units, key=lambda unit: rank.get(parameter_of(unit), len(rank)))]


def commonest(kinds: Sequence[str]) -> list[str]:
    """Those of which there are the most lines, as many as can be named."""
    return sorted(dict.fromkeys(kinds), key=lambda kind: -kinds.count(kind))[:MOST_KINDS]


def kind_styles(kinds: Sequence[str], named: Sequence[str]) -> dict[str, tuple[str, LineStyle]]:
    """Colour and line style of each kind: dashed where the colours come round again, pale where it has no name."""
    distinct = list(dict.fromkeys(kinds))
    styles: dict[str, tuple[str, LineStyle]] = dict.fromkeys(distinct, (style.BAND, "-"))
    for i, kind in enumerate(kind for kind in distinct if kind in named):
        styles[kind] = (style.CYCLE[i % len(style.CYCLE)], "-" if i < len(style.CYCLE) else (0, (4, 1.5)))
    return styles


def draw_kinds(axes: Axes, steps: Array, values: Array, kinds: Sequence[str], named: Sequence[str]) -> None:
    """Draws `values [lines, steps]`, of which `kinds` says the kind of each line, the `named` in colour; NaN is left out.

    Of a kind of many lines the median, its range shaded, and the lines thin.
    """
    present = np.isfinite(values).any(axis=0)
    x, values = steps[present], values[:, present]
    thin = len(values) > FEW
    for kind, (color, dash) in kind_styles(kinds, named).items():
        lines = values[[k == kind for k in kinds]]
        lines = lines[np.isfinite(lines).any(axis=1)]
        if not len(lines) or not len(x):
            continue
        if len(x) == 1:
            again = np.repeat(x, len(lines))
            axes.plot(again, lines[:, 0], ls="none", marker="o", ms=3, color=color, alpha=0.7)
            continue
        if not thin or len(lines) == 1:
            axes.plot(x, lines.T, color=color, ls=dash, lw=1.1, alpha=0.9)
            continue
        known = np.isfinite(lines).any(axis=0)
        low, middle, high = (f(lines[:, known], axis=0) for f in (np.nanmin, np.nanmedian, np.nanmax))
        axes.fill_between(x[known], low, high, color=color, alpha=0.13, lw=0)
        axes.plot(x, lines.T, color=color, lw=0.4, alpha=0.35)
        axes.plot(x[known], middle, color=color, ls=dash, lw=1.5)


def name_kinds(axes: Axes, steps: Array, values: Array, kinds: Sequence[str], height: float, named: Sequence[str]) -> None:
    """Each of the `named` kinds at the right edge, where the median of its lines ends."""
    ends = []
    for kind, (color, _) in kind_styles(kinds, named).items():
        lines = values[[k == kind for k in kinds]]
        last = [line[np.isfinite(line)][-1] for line in lines if np.isfinite(line).any()]
        if last and kind in named:
            ends.append((float(steps[-1]), float(np.median(last)), kind, color))
    style.label_ends(axes, ends, height=height, size=7.2 if len(ends) <= 9 else 6.5)


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
    named = sorted(largest, key=largest.__getitem__, reverse=True)[:MOST_COLOURS]
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
    if len(order) > MOST_COLOURS:
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
    for at, (group, kinds) in enumerate(shown):
        rows, names = list(kinds), list(kinds.values())
        _rates(panels[2 * at], history.steps, history.lr[rows], names)
        panels[2 * at].set_title(FAMILIES.get(group, group) or "All units")
        _multipliers(panels[2 * at + 1], history.steps, history.multiplier[rows], names)
        panels[2 * at + 1].set_title(f"spread at most {_largest_ratio(history.lr[rows]):.2f}\u00d7", **_NOTE)
    for axes in panels[: -arrangement.columns]:
        axes.set_xlabel("")
    return figure


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
