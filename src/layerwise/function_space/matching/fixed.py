"""Parameters whose rates the user wants to keep."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import Tensor

from layerwise.errors import LayerwiseError

#: The note of a parameter whose rate the user keeps.
FIXED = "fixed"


def fixed_parameters(parameters: Mapping[str, Tensor], patterns: Sequence[str]) -> dict[str, str]:
    """The parameters that fit a pattern, each with the note that a report has for it.

    Raises:
        LayerwiseError: a pattern that fits none.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise LayerwiseError(f"fixed pattern {pattern!r} fits no parameter")
        found |= dict.fromkeys(names, FIXED)
    return found
