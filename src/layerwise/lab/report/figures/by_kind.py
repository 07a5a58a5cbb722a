"""Many lines over steps, told apart by kind of tensor: of a kind the median, its range shaded, and the lines thin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from layerwise.lab.report import style
from layerwise.lab.runs.recorded import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_KINDS = 13  # names that fit beside a panel
FEW = 8  # lines that need no median to be told apart
LineStyle = str | tuple[int, tuple[float, float]]
Styles = Mapping[str, tuple[str, LineStyle]]


def kind_styles(kinds: Sequence[str], most: int = MOST_KINDS) -> Styles:
    """Colour and line style of each kind: dashed where the colours come round again, grey beyond the commonest."""
    distinct = list(dict.fromkeys(kinds))
    named = sorted(distinct, key=lambda kind: -kinds.count(kind))[:most]
    styles: dict[str, tuple[str, LineStyle]] = dict.fromkeys(distinct, (style.MUTED, "-"))
    for i, kind in enumerate(kind for kind in distinct if kind in named):
        styles[kind] = (style.CYCLE[i % len(style.CYCLE)], "-" if i < len(style.CYCLE) else (0, (4, 1.5)))
    return styles


def draw_kinds(axes: Axes, steps: Array, values: Array, kinds: Sequence[str], styles: Styles) -> None:
    """Draws `values [lines, steps]`, of which `kinds` says the kind of each line; NaN is left out."""
    present = np.isfinite(values).any(axis=0)
    x, values = steps[present], values[:, present]
    thin = len(values) > FEW
    for kind, (color, dash) in styles.items():
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


def name_kinds(axes: Axes, steps: Array, values: Array, kinds: Sequence[str], styles: Styles, height: float) -> None:
    """Each kind that has a colour named at the right edge, where the median of its lines ends."""
    ends = []
    for kind, (color, _) in styles.items():
        lines = values[[k == kind for k in kinds]]
        last = [line[np.isfinite(line)][-1] for line in lines if np.isfinite(line).any()]
        if last and color != style.MUTED:
            ends.append((float(steps[-1]), float(np.median(last)), kind, color))
    style.label_ends(axes, ends, height=height, size=7.2 if len(ends) <= 9 else 6.5)
