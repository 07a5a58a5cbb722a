"""What a sweep shows: the figure as PNG, PDF and SVG, the table on the terminal, as Markdown and as JSON.

Columns of the table (see `Transfer`): shift: the best rate over the base's best, as a factor and in steps of the grid. to
failure: the first rate that fails over the base's best. safety: what to divide the base's best rate by. On pages too: 95 %
of the shifts where seeds are resampled, and the loss at half of the base's best rate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from layerwise.lab.experiments.sweep.analysis import Curve, Transfer, curves_of, transfers
from layerwise.lab.experiments.sweep.run_sweep import read_results
from layerwise.lab.experiments.sweep.sweep_config import SweepConfig
from layerwise.lab.experiments.sweep.trials import make_plan
from layerwise.lab.models.family import AXIS_NAMES, Axis
from layerwise.lab.report import style
from layerwise.lab.report.figures.rate_grid import draw_losses
from layerwise.lab.runs.directory import write_json

LOSS_NAMES = {"val_loss": "Final validation loss", "loss": "Final training loss"}


def analyse(config: SweepConfig) -> tuple[list[Curve], list[Transfer]]:
    """Curves and table of a sweep's results, as far as there are any."""
    curves = curves_of(config, make_plan(config), read_results(config.run_path))
    return curves, transfers(curves, {m: config.sweep.step_of(m) for m in config.sweep.methods})


def write_report(config: SweepConfig) -> list[Transfer]:
    """Writes `transfer.png`, `.pdf`, `.svg`, `table.md` and `table.json` into the sweep's folder and returns the table."""
    curves, rows = analyse(config)
    folder = config.run_path
    panels = Panels("", curves, config.sweep.axis, LOSS_NAMES[config.sweep.loss])
    style.save_figure(lambda: transfer_figure([panels]), folder, "transfer")
    (folder / "table.md").write_text(markdown(rows, config.sweep.axis), encoding="utf-8")
    write_json(folder / "table.json", [asdict(row) for row in rows])
    return rows


def titles(axis: Axis) -> tuple[str, ...]:
    """Of the columns of `cells`."""
    of_losses = ("loss at own best", "at base's best")
    return ("method", AXIS_NAMES[axis], "best rate", "shift", "steps", *of_losses, "to failure", "safety")


def cells(row: Transfer) -> tuple[str, ...]:
    """The columns of a row as text; `!` marks a best rate at the end of its grid, `diverged` a loss that is none."""
    edge = "!" if row.edge else ""
    name = (row.method, f"{row.size:g}")
    if row.best is None or row.shift is None or row.grid_steps is None:
        return (*name, "diverged", *[""] * 6)
    failure = "" if row.to_failure is None else f"{'> ' if row.open_ended else ''}{row.to_failure:.3g}x"
    return (
        *name,
        f"{row.best:.2g}{edge}",
        f"{row.shift:.3g}x{edge}",
        f"{row.grid_steps:+.0f}" if round(row.grid_steps) else "0",
        f"{row.own_loss:.3f} ± {row.spread:.3f}",
        "diverged" if row.carried_loss is None else f"{row.carried_loss:.3f}",
        failure,
        "?" if row.safety is None else f"{row.safety:.2g}",
    )


def details(row: Transfer) -> tuple[str, ...]:
    """The columns that a page has beside those of the terminal."""
    interval = "" if row.interval is None else "{:+.0f}..{:+.0f}".format(*row.interval)
    half = "" if row.half_loss is None else f"{row.half_loss:.3f}"
    return (interval.replace("+0", "0").replace("-0", "0"), half)


def markdown(rows: Sequence[Transfer], axis: Axis) -> str:
    """A Markdown table."""
    columns = (*titles(axis), "steps, 95 %", "at half of it")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += [f"| {' | '.join((*cells(row), *details(row)))} |" for row in rows]
    return "\n".join(lines) + "\n"


TITLES = {"standard": "Standard", "flerm": "FLeRM", "uniform": "Uniform", "mup": "1/width (muP, Adam)"}


@dataclass(frozen=True)
class Panels:
    """One row of the figure: the curves of one sweep."""

    title: str
    curves: Sequence[Curve]
    axis: Axis
    ylabel: str


def transfer_figure(rows: Sequence[Panels]) -> Figure:
    """A row of panels per sweep, curves as `draw_losses` draws them; dashed: the base's best rate, carried over."""
    methods = list(dict.fromkeys(curve.method for row in rows for curve in row.curves))
    figure = style.new_figure(style.WIDTH, 0.55 + 1.75 * len(rows))
    grid = figure.subplots(len(rows), len(methods), sharey="row", squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        low, high = _limits(row.curves)
        for method, axes in zip(methods, line, strict=True):
            curves = [curve for curve in row.curves if curve.method == method]
            axes.set_ylim(low, high)
            _panel(axes, curves)
            if row is rows[0]:
                axes.set_title(TITLES.get(method, method))
            if row is rows[-1]:
                axes.set_xlabel("Base learning rate")
        label = f"{row.ylabel}, nats"
        line[0].set_ylabel(f"{row.title}\n{label}" if row.title else label)
        sizes = list(dict.fromkeys(curve.size for curve in row.curves))
        axis = AXIS_NAMES[row.axis]
        entries = [
            Line2D([], [], color=look.color, marker=look.marker, ms=4, mew=0, mec=style.INK, label=style.plain(size))
            for size, look in _looks(sizes).items()
        ]
        line[-1].legend(
            handles=entries, title=axis[0].upper() + axis[1:], loc="upper left", bbox_to_anchor=(1.0, 1.02),
            handlelength=1.2, title_fontsize=8, alignment="left",
        )  # fmt: skip
    return figure


def _looks(sizes: Sequence[float]) -> dict[float, style.Look]:
    """A colour and a marker for each size: far apart for few, shades in order for many."""
    colours = [style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE]
    if len(sizes) > len(colours):
        colours = style.shades(0.85 * (1 - i / (len(sizes) - 1)) for i in range(len(sizes)))
    looks = map(style.Look, colours, itertools.cycle(style.MARKERS))
    return dict(zip(sizes, looks, strict=False))  # colours and markers to spare


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """From the best loss to the worst of: the loss at a base's best rate, and a little above every curve's best."""
    bests = [curve.mean(curve.best) for curve in curves if curve.best is not None]
    if not bests:
        return 0.0, 1.0
    carried = [
        curve.mean(base.best)
        for base in curves
        for curve in curves
        if curve.method == base.method and base.best is not None and base.best in curve.losses
    ]
    reach = min(curve.ceiling for curve in curves if curve.best is not None)
    shown = [value for value in [*carried, reach] if math.isfinite(value) and value <= 2 * reach]
    low, high = min(bests), max([*shown, *bests])
    margin = 0.08 * (high - low or 1.0)  # one curve, of which nothing but its best is known
    return low - margin, high + 2 * margin


def _panel(axes: Axes, curves: Sequence[Curve]) -> None:
    if not curves:
        axes.set_axis_off()
        return
    style.log_scale(axes.xaxis, [lr for curve in curves for lr in curve.losses], 1.5)
    axes.set_xticks(axes.get_xticks()[::2])
    if curves[0].best is not None:
        axes.axvline(curves[0].best, color=style.MUTED, lw=0.8, ls=(0, (3, 3)), zorder=1)
    looks = _looks([curve.size for curve in curves])
    for curve in curves:
        draw_losses(axes, curve, looks[curve.size], scale=0.65)
