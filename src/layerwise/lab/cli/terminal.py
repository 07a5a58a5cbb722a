"""Tables on a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

NARROW = 9  # characters: longer titles of numbers are broken


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[int] = ()) -> Table:
    """A table for rich to print, in 80 columns where it can be: the first column names the row, the others are numbers.

    Args:
        titles: of the columns.
        rows: as many cells each.
        bold: numbers of rows that stand out.
    """
    from rich.table import Table

    made = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for number, title in enumerate(titles):
        head = "\n".join(textwrap.wrap(title, NARROW)) if number else title
        made.add_column(
            head,
            justify="right" if number else "left",
            vertical="bottom",
            overflow="fold",  # of the first: the end of a name tells it from others
            no_wrap=number > 0,
        )
    for number, row in enumerate(rows):
        made.add_row(*row, style="bold" if number in bold else None)
    return made
