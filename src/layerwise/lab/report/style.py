"""How every figure of the project looks: colours, type, sizes, and how a figure is saved.

Figures are drawn in the light palette. In the page the same SVG follows the reader's light or dark theme: each colour of
`THEME` is replaced by a CSS variable of its own (`themed_svg`), whose two values `theme_css` writes.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from scipy.optimize import isotonic_regression

from layerwise.lab.runs.recorded import Array

INK = "#1c2127"
MUTED = "#666e78"
GRID = "#e4e7eb"
BAND = "#c9ced5"
PAPER = "#ffffff"

# Okabe and Ito's colour-blind safe colours, a few darkened for thin lines on white; the second value is for dark pages.
BLUE, GREEN, VERMILLION, AMBER = "#0072b2", "#00916a", "#d4530a", "#d08c00"
PURPLE, SKY, GREY, BROWN = "#b4568f", "#4aa3dc", "#70757c", "#8a6a3b"
THEME = {
    INK: "#e6e9ed",
    MUTED: "#9aa3ad",
    GRID: "#2d333a",
    BAND: "#49515a",
    PAPER: "#14181c",
    BLUE: "#4ba8e3",
    GREEN: "#2cc196",
    VERMILLION: "#f47d3c",
    AMBER: "#efb23c",
    PURPLE: "#d98bbd",
    SKY: "#86c8f2",
    GREY: "#a2a9b1",
    BROWN: "#c4a271",
}
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, AMBER, SKY, BROWN, GREY)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")

WIDTH = 7.2  # inches: the text width of a two-column paper


@dataclass(frozen=True)
class Arrangement:
    """What a figure is drawn for: its width in inches, and how many panels stand side by side."""

    width: float
    columns: int

    def panels(self, figure: Figure, count: int, **keywords: Any) -> list[Axes]:
        """`count` axes in rows of `columns`."""
        rows = -(-count // self.columns)
        return list(figure.subplots(rows, min(count, self.columns), squeeze=False, **keywords).flat)

    def height(self, count: int, of_one: float) -> float:
        """Inches of that many panels."""
        return of_one * -(-count // self.columns)


WIDE, PHONE = Arrangement(WIDTH, 2), Arrangement(4.0, 1)
NORM_MAP = "magma"
RATE_MAP = "layerwise_rate"


@dataclass(frozen=True)
class Look:
    """How one contender is drawn: the same in every figure."""

    color: str
    marker: str = "o"


_FONTS = ("Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")

_TICKS = {"color": MUTED, "labelcolor": INK, "labelsize": 8, "major.size": 3, "major.width": 0.7}
_RC: dict[str, Any] = {
    "figure.constrained_layout.w_pad": 0.05,
    "figure.constrained_layout.h_pad": 0.05,
    "savefig.dpi": 220,
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titley": 1.0,  # no search for what a title might lie over, which takes a tenth of the time
    "axes.labelsize": 8.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in _TICKS.items()},
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.color": INK,
    "text.parse_math": False,  # names of runs and contenders are text, whatever dollars they hold
    "svg.hashsalt": "layerwise",  # the same figure is the same file
    "svg.fonttype": "path",
    "pdf.fonttype": 3,  # outlines: cutting a TrueType font down to its glyphs takes half a second a font
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw inside with the project's style; matplotlib's own settings are as before afterwards. Needs no display."""
    if RATE_MAP not in mpl.colormaps:
        # 1, an untouched rate, is nearly the paper; the slower a layer, the deeper the colour.
        stops = ["#0b2545", "#134b7a", "#2f7fb3", "#79b4d4", "#c3dcea", "#f4f1ea"]
        mpl.colormaps.register(LinearSegmentedColormap.from_list(RATE_MAP, stops))
    known = set(font_manager.get_font_names())
    # Two families: what the first has no glyph for (raised minus signs, in some) is taken from matplotlib's own font.
    families = list(dict.fromkeys([*[font for font in _FONTS if font in known][:1], _FONTS[-1]]))
    with mpl.rc_context({**_RC, "font.family": families}):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, without pyplot's global state: nothing to close, no window system needed."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def page_figure(draw: Callable[[], Figure], name: str) -> str:
    """Draw in the project's style, for the page alone."""
    with styled():
        return themed_svg(_svg(_laid_out(draw())), name)


def _laid_out(figure: Figure) -> Figure:
    """The figure with its panels placed once for all: `savefig` places and draws again for every file otherwise."""
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
    figure.set_layout_engine(None)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def save_figure(draw: Callable[[], Figure], folder: Path, name: str) -> str:
    """Draw in the project's style, save `name` as PNG, PDF and SVG in `folder`, and return the SVG for the page."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it reports every font subset of a PDF
    with styled():
        figure = _laid_out(draw())
        figure.savefig(folder / f"{name}.png", facecolor=PAPER)
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
        svg = _svg(figure)
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    return themed_svg(svg, name)


def themed_svg(svg: str, name: str) -> str:
    """The SVG as an element of a page: ids of its own, colours as CSS variables, width from the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for color in THEME:
        svg = svg.replace(color, f"var(--c{color[1:]})")
    tag, more = svg.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", tag) + ">" + more


def theme_css() -> str:
    """The two values of each colour variable."""
    light = "".join(f"--c{c[1:]}:{c};" for c in THEME)
    dark = "".join(f"--c{c[1:]}:{d};" for c, d in THEME.items())
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"


# Points between a leader line and what it joins; it begins at the text's edge: clipping it there would only take time.
_GAPS = {"shrinkA": 1, "shrinkB": 2, "patchA": None}


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], *, height: float, size: float = 8) -> None:
    """Name lines at the right edge: one (x, y, text, colour) for each line, moved apart where they would overlap.

    `height` is the height of the axes in inches, about; axis limits and scales must be set before.
    """
    if not ends:
        return
    to_fraction = axes.transScale + axes.transLimits
    fractions = [float(to_fraction.transform((x, y))[1]) for x, y, _, _ in ends]
    placed = spread_apart(fractions, gap=size * 1.25 / 72 / height)
    for (_, _, text, color), at, wanted in zip(ends, placed, fractions, strict=True):
        end, arrow = min(max(wanted, 0.0), 1.0), None
        if abs(at - wanted) > 0.01:
            arrow = {"arrowstyle": "-", "color": color, "lw": 0.6, "alpha": 0.6, "relpos": (0, 0.5)} | _GAPS
        axes.annotate(
            text, (1.0, end), xycoords="axes fraction", xytext=(9, (at - end) * height * 72), textcoords="offset points",
            color=color, fontsize=size, ha="left", va="center", arrowprops=arrow, annotation_clip=False,
        )  # fmt: skip


def spread_apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions within 0 and 1 in the order of `wanted`, `gap` apart, as near to the wanted ones as least squares has it.

    Where there is no room for all, they leave the range at both sides.
    """
    order = np.argsort(wanted, kind="stable")
    steps, room = gap * np.arange(len(wanted)), 1 - gap * (len(wanted) - 1)
    nearest = isotonic_regression(np.asarray(wanted)[order] - steps).x  # at least `gap` apart: never falling without it
    placed = np.empty(len(wanted))
    placed[order] = (np.clip(nearest, 0, room) if room > 0 else room / 2) + steps
    return [float(at) for at in placed]


def plain_log_ticks(axis: Axis, low: float, high: float) -> None:
    """Few ticks on a log axis, at 1, 2, 5 of each decade (or decades alone), written as plain numbers."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**e for e in decades for d in digits if low <= d * 10.0**e <= high]
        if len(ticks) <= 6:
            break
    if len(ticks) > 6:
        ticks = ticks[:: -(-len(ticks) // 6)]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda x, _: plain(x))


def log_scale(axis: Axis, values: Collection[float], margin: float) -> None:
    """A log axis over these positive values, and a factor beyond them on both sides."""
    low, high = float(min(values)) / margin, float(max(values)) * margin
    if axis is axis.axes.xaxis:
        axis.axes.set(xscale="log", xlim=(low, high))
    else:
        axis.axes.set(yscale="log", ylim=(low, high))
    plain_log_ticks(axis, low, high)


def shades(at: Iterable[float]) -> list[str]:
    """Colours in order of depth, from 0 (dark) to 1."""
    return [to_hex(mpl.colormaps["viridis"](depth)) for depth in at]


def step_axis(axes: Axes, steps: Array) -> None:
    """An x axis of these optimizer steps: whole numbers, however short the run, and one alone in the middle."""
    axes.set_xlabel("Step")
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 0.5, steps[0] + 0.5)
        axes.set_xticks([steps[0]], [f"{steps[0]:g}"])
        return
    axes.set_xlim(steps[0], steps[-1])
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def shortened(text: str, most: int = 40) -> str:
    """A label that leaves room for what it labels: its middle left out where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]}\u2026{text[-(most // 2 - 1) :]}"


_RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def power_of_ten(exponent: int) -> str:
    """10 with its exponent in raised digits."""
    return f"10{str(exponent).translate(_RAISED)}"


def plain(x: float) -> str:
    """A tick label: `0.002`, `5`, and powers of ten only far from one."""
    if x == 0 or 1e-4 <= abs(x) < 1e5:
        return f"{x:g}"
    exponent = math.floor(math.log10(abs(x)))
    mantissa = x / 10.0**exponent
    head = "" if abs(mantissa - 1) < 1e-9 else f"{mantissa:g}\u00b7"
    return f"{head}{power_of_ten(exponent)}"
