"""Names of blocks that are alike: those that differ in the numbers of their layers alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole step of a dotted name: the index of a layer


def siblings_of(name: str) -> str:
    """The pattern that a module or a parameter shares with those in its place in other blocks.

    Example:
        >>> siblings_of("h.3.mlp.c_fc")
        'h.*.mlp.c_fc'
    """
    return _NUMBER.sub("*", name)


def in_one(names: Sequence[str]) -> str:
    """Siblings under one name.

    Example:
        >>> in_one(["h.0.mlp.c_fc", "h.1.mlp.c_fc"])
        'h.{0-1}.mlp.c_fc'
    """
    return ".".join(map(_span, zip(*(name.split(".") for name in names), strict=True)))


def _span(values: Sequence[str]) -> str:
    """One step of all names."""
    if len(set(values)) == 1:
        return values[0]
    numbers = sorted({int(value) for value in values})
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"
