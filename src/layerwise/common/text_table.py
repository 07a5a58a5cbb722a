"""Tables of plain text, and large numbers in them."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

from layerwise.common.alike_names import in_one, siblings_of
from layerwise.common.group_by import group_by

#: Longer tables have one row for blocks that are alike.
LONG = 40


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Columns of equal width under their titles, which are the keys of every row, and a rule.

    Example:
        >>> print(text_table([{"role": "hidden", "lr": "0.1"}]))
        role    lr
        ------  ---
        hidden  0.1
    """
    titles, *cells = titled(rows)
    rule = ["-" * max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    return "\n".join(aligned([titles, rule, *cells]))


def titled(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """The titles of the rows, which are the keys of each, and their cells, without columns in which nothing stands."""
    titles = [title for title in rows[0] if any(row[title] for row in rows)]
    return [titles, *([row[title] for title in titles] for row in rows)]


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


def wrapped(rows: Sequence[Sequence[str]], width: int = 100) -> list[str]:
    """Names and columns of numbers, aligned right, in as many tables below one another as keep within the width.

    Example:
        >>> wrapped([("module", "lr", "update"), ("head", "0.1", "0.002")], width=15)
        ['module   lr', 'head    0.1', 'module  update', 'head     0.002']
    """
    names, *others = zip(*rows, strict=True)
    tables, lines = [[names]], []
    for column in others:
        wide = len(aligned([*zip(*tables[-1], column, strict=True)], right=range(1, len(others) + 1))[0]) > width
        if wide and len(tables[-1]) > 1:
            tables.append([names])
        tables[-1].append(column)
    for table in tables:
        lines += aligned([*zip(*table, strict=True)], right=range(1, len(table)))
    return lines


def folded(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Of a long table one row for siblings in blocks that are alike, each number from the least to the largest.

    Args:
        rows: a name first, then numbers and words. Siblings whose words differ have rows of their own.

    Example:
        >>> folded([(f"h.{block}.mlp", f"{0.1 * block:.1f}", "adam") for block in range(50)])
        [('h.{0-49}.mlp', '0.0..4.9', 'adam')]
    """
    if len(rows) <= LONG:
        return [*map(tuple, rows)]

    def same(row: Sequence[str]) -> tuple[str, ...]:
        return siblings_of(row[0]), *("#" if _is_number(cell) else cell for cell in row[1:])

    siblings = group_by(rows, same).values()
    return [
        (in_one([row[0] for row in some]), *map(_span, zip(*(row[1:] for row in some), strict=True))) for some in siblings
    ]


def _span(cells: Sequence[str]) -> str:
    """From the least to the largest."""
    if len(set(cells)) == 1:
        return cells[0]
    ordered = sorted(cells, key=_number)
    return f"{ordered[0]}..{ordered[-1]}"


def _is_number(cell: str) -> bool:
    try:
        return not math.isnan(_number(cell))
    except ValueError:
        return False


def _number(cell: str) -> float:
    return float(cell.rstrip(" %*"))


def count(x: float) -> str:
    """A number of many things, in three digits.

    Example:
        >>> count(1_234_567), count(300_000), count(17)
        ('1.23M', '300k', '17')
    """
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{suffix}"
    return f"{x:g}"
