"""Units of a network in figures: their short names, their order, and their lines over steps told apart by kind of tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from layerwise.common.layer_rate import parameter_of
from layerwise.lab.report import style
from layerwise.lab.runs.recorded import Array

MOST_KINDS = 13  # names that fit beside a panel
FEW = 8  # lines that need no median to be told apart
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
