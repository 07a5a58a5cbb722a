"""What was found of one parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from layerwise.geometry.layout import Layout

ROLES = ("embedding", "head", "hidden", "conv", "experts", "vector", "lora_A", "lora_B")
How = Literal["forward", "module", "assumed"]


@dataclass(frozen=True)
class Found:
    """A parameter tensor and what it does.

    Attributes:
        name: its first name.
        parameter: the tensor.
        role: one of `ROLES`.
        layout: how it holds its units.
        kernel: the size of a convolution's kernel.
        note: what is not certain about it, "" if nothing.
        tied: its other names.
        how: how this is known: from a forward pass, from the module that owns it, or from its name and shape alone.
        undecayed: whether it is a table that is added to activations or read by position (learned positions, class tokens),
            or one that the model's own `no_weight_decay()` names.
    """

    name: str
    parameter: nn.Parameter
    role: str
    layout: Layout
    kernel: tuple[int, ...] = ()
    note: str = ""
    tied: tuple[str, ...] = ()
    how: How = "module"
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
