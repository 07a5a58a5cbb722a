"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of equal width under a header and a rule.

    Example:
        >>> print(text_table(("role", "lr"), [("hidden", "0.1")]))
        role    lr
        ------  ---
        hidden  0.1
    """
    table = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, tuple("-" * width for width in widths))
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)
