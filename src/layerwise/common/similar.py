"""Names that were mistyped: which known one was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.5) -> list[str]:
    """The known words most like this one, best first; empty where none is.

    Args:
        word: what was given.
        known: what could have been meant.
        count: how many to return at most.
        cutoff: how alike they have to be, from 0 (anything) to 1 (equal).
    """
    return difflib.get_close_matches(word, list(known), n=count, cutoff=cutoff)
