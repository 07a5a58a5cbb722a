"""Names that were mistyped: which known one was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: What is called otherwise elsewhere, or was once.
_OTHER_NAMES = {"learning_rate": "lr", "wd": "weight_decay", "noise": "rates"}


def nearest(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.5) -> list[str]:
    """The known words most like this one, best first; empty where none is. Another name for one of them is that one.

    Args:
        word: what was given.
        known: what could have been meant.
        count: how many to return at most.
        cutoff: how alike they have to be, from 0 (anything) to 1 (equal).
    """
    words = list(known)
    other = _OTHER_NAMES.get(word)
    return [other] if other in words else difflib.get_close_matches(word, words, n=count, cutoff=cutoff)
