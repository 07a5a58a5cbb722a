"""What a sweep says: curves of loss against rate, and how far the best rate moves from the base to each size; the figure of
those, as PNG, PDF and SVG, and the table of these, on the terminal, as Markdown and as JSON.

Columns of the table (see `Transfer`): shift: the best rate over the base's best, as a factor and in steps of the grid. to
failure: the first rate that fails over the base's best. safety: what to divide the base's best rate by. On pages too: 95 %
of the shifts where seeds are resampled, and the loss at half of the base's best rate.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from layerwise.common.group_by import group_by
from layerwise.lab.experiments.sweep.run_sweep import Method, Plan, SweepConfig, loss_of, make_plan, read_results
from layerwise.lab.models.family import AXIS_NAMES, Axis
from layerwise.lab.report import style
from layerwise.lab.report.figures.loss import draw_losses
from layerwise.lab.report.grouping import LossesByRate
from layerwise.lab.runs.directory import write_json

Results = Mapping[str, Mapping[str, Any]]

#: A rate fails where it loses this part of the way from the initial loss to the size's best one.
LOST = 0.15
#: The advised rate is this factor below the first that fails: the paper's transfers fail from one grid step away.
MARGIN = 4.0
#: Resamples are listed where there are at most so many, and drawn beyond.
MOST = 4096
COVERED = 0.95
TITLES = {"standard": "Standard", "flerm": "FLeRM", "uniform": "Uniform", "mup": "1/width (muP, Adam)"}
LOSS_NAMES = {"val_loss": "Final validation loss", "loss": "Final training loss"}


@dataclass(frozen=True)
class Curve(LossesByRate):
    """Losses of one method at one size, `losses[lr]` a value per seed, infinite for a run that diverged.

    `initial`: mean validation loss before the first step.
    """

    method: Method
    size: float
    losses: Mapping[float, Sequence[float]]
    initial: float

    def spread(self, lr: float) -> float:
        """Half the range over seeds."""
        values = self.losses[lr]
        return (max(values) - min(values)) / 2

    @property
    def at_edge(self) -> bool:
        """Whether the optimum may lie beyond the grid: the best rate is an end of it, or all that is known."""
        return self.best is not None and (len(self.losses) == 1 or self.edge is not None)

    @property
    def ceiling(self) -> float:
        """The loss above which a rate fails."""
        if self.best is None:
            return -math.inf
        best = self.mean(self.best)
        return best + LOST * max(self.initial - best, 0.0)

    @property
    def failing(self) -> float | None:
        """The lowest rate above the best that fails; None where none on the grid does."""
        if self.best is None:
            return min(self.losses)
        # One that diverged fails, though the ceiling is infinite where the initial loss is unknown.
        means = {lr: self.mean(lr) for lr in self.losses if lr > self.best}
        return min((lr for lr, mean in means.items() if not (math.isfinite(mean) and mean <= self.ceiling)), default=None)


@dataclass(frozen=True)
class Transfer:
    """One row of the table. Losses are in nats; `None` is unknown: every rate diverged, or the grid ends before.

    shift: best rate here over the base's best. grid_steps: the same in steps of the grid. interval: 95 % of the latter
    where seeds are resampled (`shift_interval`). edge: the best rate (here or at the base) is an end of its grid, so that
    the shift is only a bound. own_loss, spread: at the best rate here. carried_loss: at the base's best rate. half_loss:
    at half of it, where that is on the grid. to_failure: the lowest rate that fails here over the base's best;
    `open_ended`: no rate on the grid fails, and it is a lower bound. safety: by how much to divide the base's best rate
    to stay a factor of 4 below the failing one.
    """

    method: Method
    size: float
    best: float | None
    shift: float | None
    grid_steps: float | None
    interval: tuple[float, float] | None
    edge: bool
    own_loss: float | None
    spread: float | None
    carried_loss: float | None
    half_loss: float | None
    to_failure: float | None
    open_ended: bool
    safety: float | None


def curves_of(config: SweepConfig, plan: Plan, results: Results) -> list[Curve]:
    """The curves for which there are results, methods and sizes in the config's order."""
    found = []
    for method, size in itertools.product(config.sweep.methods, config.sweep.sizes):
        at = {point: trial.id for point, trial in plan.points.items() if (point.method, point.size) == (method, size)}
        rows = {point: results[id] for point, id in at.items() if id in results}
        by_lr = group_by(sorted(rows, key=lambda point: point.lr), lambda point: point.lr)
        losses = {lr: [loss_of(rows[point], config.sweep.loss) for point in points] for lr, points in by_lr.items()}
        initial = [float(row["first_val_loss"]) for row in rows.values() if row.get("first_val_loss") is not None]
        if losses:
            found.append(Curve(method, size, losses, fmean(initial) if initial else math.inf))
    return found


def transfers(curves: Sequence[Curve], step_of: Mapping[Method, float]) -> list[Transfer]:
    """A row for each curve; the first size of a method is its base. `step_of`: factor between neighbours of a grid."""
    bases = {curve.method: curve for curve in reversed(curves)}
    return [_transfer(bases[curve.method], curve, step_of[curve.method]) for curve in curves]


def _transfer(base: Curve, curve: Curve, step: float) -> Transfer:
    start, best, failing = base.best, curve.best, curve.failing
    shift = best / start if best and start else None
    reach = failing if failing is not None else max(curve.losses)
    to_failure = reach / start if start else None
    known = to_failure is not None and (failing is not None or to_failure >= MARGIN)
    return Transfer(
        method=curve.method,
        size=curve.size,
        best=best,
        shift=shift,
        grid_steps=math.log(shift) / math.log(step) if shift else None,
        interval=None if curve is base else shift_interval(base, curve, step),
        edge=base.at_edge or curve.at_edge,
        own_loss=curve.mean(best) if best else None,
        spread=curve.spread(best) if best else None,
        carried_loss=_loss_at(curve, start),
        half_loss=_loss_at(curve, start / 2 if start else None),
        to_failure=to_failure,
        open_ended=failing is None,
        safety=max(1.0, MARGIN / to_failure) if known and to_failure else None,
    )


def _loss_at(curve: Curve, lr: float | None) -> float | None:
    """Mean loss at a rate, which may differ from the grid's by rounding; None off the grid and where it diverged."""
    near = [rate for rate in curve.losses if lr is not None and math.isclose(rate, lr, rel_tol=1e-3)]
    value = curve.mean(near[0]) if near else math.inf
    return value if math.isfinite(value) else None


def best_rates(curve: LossesByRate) -> dict[float, int]:
    """How often each rate is best where seeds are drawn with replacement; a seed's losses at all rates stay together.

    Empty with one seed, or where seeds are missing at some rates. Where no rate has finite losses there is no best.
    """
    seeds = {len(values) for values in curve.losses.values()}
    if len(seeds) != 1 or seeds == {1}:
        return {}
    losses = np.array([curve.losses[lr] for lr in curve.rates])  # [rates, seeds]
    means = np.where(np.isfinite(losses), losses, np.inf)[:, _resamples(seeds.pop())].mean(-1)
    best, counts = np.unique(means.argmin(0)[np.isfinite(means.min(0))], return_counts=True)
    return {curve.rates[number]: int(count) for number, count in zip(best, counts, strict=True)}


def _resamples(seeds: int) -> NDArray[np.int64]:
    """`[resamples, seeds]`"""
    if seeds**seeds <= MOST:
        return np.array([*itertools.product(range(seeds), repeat=seeds)])
    generator = random.Random(0)
    return np.array([generator.choices(range(seeds), k=seeds) for _ in range(MOST)])


def shift_interval(base: LossesByRate, curve: LossesByRate, step: float) -> tuple[float, float] | None:
    """95 % of the shifts, in steps of the grid, where the seeds of both sizes are resampled, each for itself.

    With three seeds that is nearly the range over seeds: an honest width, and no narrower for being flat.

    Args:
        base: losses of the base size.
        curve: losses of the size it is compared with.
        step: factor between neighbours of the grid.

    Returns:
        Ends of the interval; None with one seed.
    """
    starts, bests = best_rates(base), best_rates(curve)
    if not starts or not bests:
        return None
    shifts = np.log(np.divide.outer([*bests], [*starts])).ravel() / np.log(step)
    counts = np.multiply.outer([*bests.values()], [*starts.values()]).ravel()
    order = np.argsort(shifts)
    reached = np.cumsum(counts[order]) / counts.sum()
    low, high = np.searchsorted(reached, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(shifts[order[low]]), float(shifts[order[high]])


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
