"""What a sweep shows: the figure as PNG, PDF and SVG, the table on the terminal, as Markdown and as JSON.

Columns of the table (see `Transfer`): shift: the best rate over the base's best, as a factor and in steps of the grid. to
failure: the first rate that fails over the base's best. safety: what to divide the base's best rate by. On pages too: 95 %
of the shifts where seeds are resampled, and the loss at half of the base's best rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from layerwise.lab.experiments.sweep.analysis import Curve, Transfer, curves_of, transfers
from layerwise.lab.experiments.sweep.results import RESULTS, read_results
from layerwise.lab.experiments.sweep.sweep_config import SweepConfig
from layerwise.lab.experiments.sweep.trial_plan import make_plan
from layerwise.lab.models.family import AXIS_NAMES, Axis
from layerwise.lab.runs.directory import write_json

LOSS_NAMES = {"val_loss": "Final validation loss", "loss": "Final training loss"}


def analyse(config: SweepConfig, folder: Path) -> tuple[list[Curve], list[Transfer]]:
    """Curves and table of the results in a sweep's folder, as far as there are any."""
    curves = curves_of(config, make_plan(config), read_results(folder / RESULTS))
    return curves, transfers(curves, {m: config.sweep.step_of(m) for m in config.sweep.methods})


def write_report(config: SweepConfig, folder: Path) -> list[Transfer]:
    """Writes `transfer.png`, `.pdf`, `.svg`, `table.md` and `table.json` and returns the table."""
    from layerwise.lab.experiments.sweep.figure import Panels, transfer_figure
    from layerwise.lab.report.style import save_figure

    curves, rows = analyse(config, folder)
    panels = Panels("", curves, config.sweep.axis, LOSS_NAMES[config.sweep.loss])
    save_figure(lambda: transfer_figure([panels]), folder, "transfer")
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
