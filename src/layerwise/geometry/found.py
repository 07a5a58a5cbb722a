"""What was found of one parameter, and what groups were made of, so that an optimizer can see what is done to it later."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from layerwise.common.parameter_names import canonical_names, unwrap
from layerwise.geometry.layout import Layout

ROLES = ("embedding", "head", "hidden", "conv", "experts", "vector", "lora_A", "lora_B")
#: Of matrices inside the network.
MATRIX_ROLES = ("hidden", "conv", "experts", "lora_A", "lora_B")
How = Literal["forward", "module", "assumed"]


@dataclass(frozen=True)
class Found:
    """A parameter tensor and what it does."""

    name: str  # its first
    parameter: nn.Parameter
    role: str  # one of `ROLES`
    layout: Layout  # how it holds its units
    kernel: tuple[int, ...] = ()  # the size of a convolution's
    note: str = ""  # what is not certain about it, "" if nothing
    tied: tuple[str, ...] = ()  # its other names
    how: How = "module"  # known from a forward pass, from the module that owns it, or from its name and shape alone
    #: whether it is a table that is added to activations or read by position (learned positions, class tokens), or one that
    #: the model's own `no_weight_decay()` names
    undecayed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.tied)

    @property
    def assumed(self) -> bool:
        """Whether name and shape are all that it was found by."""
        return self.how == "assumed"

    @property
    def is_factor(self) -> bool:
        """Whether it is a factor of a low-rank adapter."""
        return self.role in ("lora_A", "lora_B")


class Origin:
    """A model, and what was said and seen of its parameters: the key `origin` of the groups of `param_groups`.

    It does not keep the model alive. A copy of it, or one that was pickled, knows no model: its parameters are others.
    """

    def __init__(
        self, model: nn.Module | None = None, overrides: Any = None, splits: Any = None, factors: Any = None
    ) -> None:
        self._model = None if model is None else weakref.ref(unwrap(model))
        self.overrides = overrides
        self.splits = splits
        self.factors = factors
        #: by name what a forward pass showed, of frozen ones too, with a tensor of the shape alone
        self.seen: Mapping[str, Found] = {}

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
