"""The table of a sweep, for the terminal and for a page.

shift: the best rate over the base's best, as a factor and in steps of the grid. to failure: the first rate that fails
over the base's best. safety: what to divide the base's best rate by. See `Transfer`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerwise.lab.experiments.sweep.analysis import Transfer
from layerwise.lab.models.sizes import AXIS_NAMES, Axis

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "best rate", "shift", "steps", "loss at own best", "at base's best", "to failure", "safety",
)  # fmt: skip


def cells(row: Transfer) -> tuple[str, ...]:
    """The columns of a row as text; `!` marks a best rate at the end of its grid, `diverged` a loss that is none."""
    edge = "!" if row.edge else ""
    if row.best is None or row.shift is None or row.grid_steps is None:
        return ("diverged", *[""] * (len(COLUMNS) - 1))
    failure = "" if row.to_failure is None else f"{'> ' if row.open_ended else ''}{row.to_failure:.3g}x"
    return (
        f"{row.best:.2g}{edge}",
        f"{row.shift:.3g}x{edge}",
        f"{row.grid_steps:+.0f}" if round(row.grid_steps) else "0",
        f"{row.own_loss:.3f} ± {row.spread:.3f}",
        "diverged" if row.carried_loss is None else f"{row.carried_loss:.3f}",
        failure,
        "?" if row.safety is None else f"{row.safety:.2g}",
    )


def markdown(rows: Sequence[Transfer], axis: Axis) -> str:
    """A Markdown table."""
    lines = [
        f"| method | {AXIS_NAMES[axis]} | {' | '.join(COLUMNS)} |",
        "|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    lines += [f"| {row.method} | {row.size:g} | {' | '.join(cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def terminal(rows: Sequence[Transfer], axis: Axis) -> Table:
    """A table for rich to print, in 80 columns: where that is not enough, the losses are broken."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for title in ("method", AXIS_NAMES[axis], *COLUMNS):
        head = "\n".join(textwrap.wrap(title, 9))
        table.add_column(head, justify="right", vertical="bottom", no_wrap=title != "loss at own best")
    table.columns[0].justify = "left"
    previous = None
    for row in rows:
        table.add_row("" if row.method == previous else row.method, f"{row.size:g}", *cells(row))
        previous = row.method
    return table
