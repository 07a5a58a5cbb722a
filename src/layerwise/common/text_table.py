"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of equal width under a header and a rule.

    Example:
        >>> print(text_table(("role", "lr"), [("hidden", "0.1")]))
        role    lr
        ------  ---
        hidden  0.1
    """
    table = [tuple(header), *map(tuple, rows)]
    rule = tuple("-" * max(map(len, column)) for column in zip(*table, strict=True))
    return "\n".join(aligned([table[0], rule, *table[1:]]))


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Lines of columns of equal width.

    Args:
        rows: as many cells each, the titles among them.
        right: numbers of the columns that are aligned right.

    Example:
        >>> aligned([("parameter", "rate"), ("up.weight", "1.5")], right={1})
        ['parameter  rate', 'up.weight   1.5']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        columns = enumerate(zip(row, widths, strict=True))
        cells = [text.rjust(width) if n in right else text.ljust(width) for n, (text, width) in columns]
        lines.append("  ".join(cells).rstrip())
    return lines
