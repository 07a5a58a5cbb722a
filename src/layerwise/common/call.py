"""A model run on a batch, in the one way that roles and function space share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from layerwise.common.parameter_names import unwrap


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: a dict as keywords, a tuple or list as arguments, anything else as one argument.

    Of a tuple as many as `forward` takes, so that the `(inputs, targets)` of a DataLoader do for a model of inputs alone.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if not isinstance(batch, (tuple, list)):
        return model(batch)
    takes = inspect.signature(unwrap(model).forward).parameters.values()
    if not any(p.kind is p.VAR_POSITIONAL for p in takes):
        batch = batch[: sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in takes)]
    return model(*batch)
