"""The table of a sweep, for the terminal and for a page.

shift: the best rate over the base's best, as a factor and in steps of the grid. to failure: the first rate that fails
over the base's best. safety: what to divide the base's best rate by. On pages too: 95 % of the shifts where seeds are
resampled, and the loss at half of the base's best rate. See `Transfer`.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.lab.experiments.sweep.analysis import Transfer
from layerwise.lab.models.family import AXIS_NAMES, Axis


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
