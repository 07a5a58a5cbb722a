"""A model run on a batch, in the one way that roles and function space share; functions that users give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from layerwise.common.parameter_names import unwrap
from layerwise.errors import LayerwiseError


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: a dict as keywords, a tuple or list as arguments, anything else as one argument.

    Of a tuple as many as `forward` takes, so that the `(inputs, targets)` of a DataLoader do for a model of inputs alone.

    Raises:
        LayerwiseError: a DataLoader, in place of what it yields.
    """
    if isinstance(batch, DataLoader):
        raise LayerwiseError("the batch is a DataLoader: give one of its batches, next(iter(loader))")
    if isinstance(batch, Mapping):
        return model(**batch)
    if not isinstance(batch, (tuple, list)):
        return model(batch)
    return model(*batch[: _takes(model)])


def call_in_words(model: nn.Module, batch: Any, name: str) -> str:
    """`call` as a line of code, where the batch is called `name`: `model(*inputs)`."""
    if isinstance(batch, Mapping):
        return f"model(**{name})"
    if not isinstance(batch, (tuple, list)):
        return f"model({name})"
    takes = _takes(model)
    return f"model(*{name})" if takes is None or takes >= len(batch) else f"model(*{name}[:{takes}])"


def _takes(model: nn.Module) -> int | None:
    """How many arguments by position; None: any number."""
    takes = inspect.signature(unwrap(model).forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in takes):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in takes)


def call_given(name: str, function: Callable[..., Any], *args: Any, needed: str) -> Any:
    """Call the function that a user gave as the argument `name`.

    Raises:
        LayerwiseError: it cannot take these arguments; with `needed`, which says what they are and how to take them.
    """
    try:
        return function(*args)
    except (TypeError, AttributeError) as error:
        called = getattr(function, "__name__", type(function).__name__)
        raise LayerwiseError(
            f"{name}={called} failed ({type(error).__name__}: {error}): it is called with {needed}"
        ) from error
