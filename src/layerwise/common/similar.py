"""Names that were mistyped: which known one was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: What is called otherwise elsewhere (nanoGPT, transformers), or was once.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "noise": "rates",
    "block_size": "seq_len",
    "max_length": "seq_len",
    "grad_clip": "clip_norm",
    "max_grad_norm": "clip_norm",
    "dtype": "precision",
    "eps": "adamw_eps",
}


def nearest(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The known words most like this one, best first; empty where none is. Another name for one of them is that one.

    Args:
        word: what was given.
        known: what could have been meant.
        count: how many to return at most.
        cutoff: how alike they have to be, from 0 (anything) to 1 (equal).
    """
    meant = {name: name for name in known}
    meant |= {other: name for other, name in _OTHER_NAMES.items() if name in meant and other not in meant}
    close = difflib.get_close_matches(word, meant, n=count, cutoff=cutoff)
    return list(dict.fromkeys(meant[each] for each in close))
