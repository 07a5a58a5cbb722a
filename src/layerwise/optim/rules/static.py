"""Fixed rates by unit: the control for any adaptive rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from layerwise.common.similar import nearest
from layerwise.errors import LayerwiseError
from layerwise.optim.rules.rule import NonNegative, RateRule, register_rule
from layerwise.optim.work.job import State


@register_rule("static")
@dataclass(frozen=True)
class StaticRates(RateRule):
    """Fixed multipliers by unit name; units that are not named keep 1. The control for any adaptive rule.

    Examples:
        >>> optimizer = lw.Scion(lw.param_groups(nn.Linear(4, 8)), lr=1e-3, rates=lw.StaticRates({"weight": 0.5}))
        >>> optimizer.layer_rates()["weight"].lr
        0.0005
    """

    multipliers: Annotated[
        Mapping[str, NonNegative], "finite multipliers of at least 0 by unit name, such as {'head.weight': 0.5}"
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # In one order and as floats: a checkpoint tells rules apart by their text.
        in_order = {name: float(self.multipliers[name]) for name in sorted(self.multipliers)}
        object.__setattr__(self, "multipliers", in_order)

    def check(self, ruled: Sequence[str], others: Sequence[str]) -> None:
        for name, value in self.multipliers.items():
            if name in ruled or (name in others and value == 1.0):
                continue
            if name in others:
                raise LayerwiseError(
                    f"StaticRates: {name!r} is given {value:g}, but its group has other rates or AdamW: leave it out"
                )
            near = nearest(name, [*ruled, *others], cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"units look like {ruled[0]!r}"
            raise LayerwiseError(f"StaticRates: no unit is named {name!r} (given {value:g}): {hint}")

    def allocate(self, param: Tensor, units: Sequence[str], sizes: Sequence[int]) -> State:
        state = super().allocate(param, units, sizes)
        values = [float(self.multipliers.get(unit, 1.0)) for unit in units]
        state["multiplier"].copy_(torch.tensor(values, device="cpu"))
        return state
