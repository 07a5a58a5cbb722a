"""What groups were made of, so that an optimizer can see what is done to the model later."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from layerwise.common.parameter_names import canonical_names, unwrap
from layerwise.geometry.found import Found


class Origin:
    """A model, and what was said and seen of its parameters: the key `origin` of the groups of `param_groups`.

    It does not keep the model alive. A copy of it, or one that was pickled, knows no model: its parameters are others.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        overrides: Any = None,
        splits: Any = None,
        seen: Mapping[str, Found] | None = None,
    ) -> None:
        self._model = None if model is None else weakref.ref(unwrap(model))
        self.overrides = overrides
        self.splits = splits
        self.seen = seen or {}

    @property
    def model(self) -> nn.Module | None:
        """None once it is gone."""
        return None if self._model is None else self._model()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Canonical name -> the tensor that stands there now, under all its names; empty once the model is gone."""
        if self.model is None:
            return {}
        named = list(self.model.named_parameters(remove_duplicate=False))
        short = canonical_names(name for name, _ in named)
        return {short[name]: parameter for name, parameter in named}

    def __reduce__(self) -> tuple[type[Origin], tuple[()]]:
        return Origin, ()

    def __repr__(self) -> str:
        return f"Origin({type(self.model).__name__})"
