"""Remembering what is the same at every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def remember(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Keep the results of a pure function of shapes and options.

    `functools.lru_cache`, which torch.compile would warn of: there the function is computed while it compiles, once.
    """
    known = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def remembered(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return known(*args, **kwargs)  # type: ignore[arg-type]  # of hashable arguments

    return remembered
