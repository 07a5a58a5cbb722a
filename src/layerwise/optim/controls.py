"""Rate rules that are not LANTON's: its closest rival, and the control for any adaptive rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.geometry import Frobenius
from layerwise.optim.rates import (
    Gradients,
    RateRule,
    Reading,
    State,
    UnitReadings,
    gather,
    scatter,
    stack_readings,
)


@dataclass(frozen=True)
class NormAdaptive(RateRule):
    """NAMO's scalar per matrix (arXiv 2602.17080): a signal-to-noise ratio in the Frobenius norm, no gradient buffer.

    ``v <- beta2 v + (1 - beta2) ||G||_F^2``; multiplier
    ``sqrt(1 - beta2^t) / (1 - beta1^t) * ||M||_F / (sqrt(v) + eps)``, at most ``ceiling``, where M is what the step is
    taken along and beta1 the momentum's weight. It belongs on steps scaled by 0.2 sqrt(max(d_out, d_in)) (``DMuon``).
    """

    beta2: float = 0.99
    eps: float = 1e-8
    ceiling: float = 1.0

    def allocate(self, param: Tensor, units: Sequence[str]) -> State:
        state = super().allocate(param, units)
        for key in ("second_moment", "gradients_seen", "beta1_power"):
            state[key] = torch.zeros_like(state["multiplier"])
        state["beta1_power"].fill_(1.0)
        return state

    def readings(self, seen: Gradients, state: State) -> list[Reading]:
        state["beta1"] = seen.beta
        return [Reading(Frobenius(), lambda: seen.grad), Reading(Frobenius(), seen.direction_input)]

    def update(self, units: Sequence[UnitReadings], keep: Tensor | None) -> None:
        norms, present = stack_readings(units, keep)
        beta1 = torch.cat([torch.full_like(u.state["multiplier"], u.state.pop("beta1", 0.0)) for u in units])
        old, count = gather(units, "second_moment"), gather(units, "gradients_seen") + present
        second = torch.where(present, torch.lerp(norms[0].square(), old, self.beta2), old)
        power = gather(units, "beta1_power")
        power = torch.where(present, power * beta1, power)
        correction = (1.0 - self.beta2**count).sqrt() / (1.0 - power).clamp(min=1e-12)
        multiplier = (correction * norms[1] / (second.sqrt() + self.eps)).clamp(max=self.ceiling)
        scatter(units, "multiplier", torch.where(present, multiplier, gather(units, "multiplier")))
        scatter(units, "second_moment", second)
        scatter(units, "gradients_seen", count)
        scatter(units, "beta1_power", power)


@dataclass(frozen=True)
class StaticRates(RateRule):
    """Fixed multipliers by unit name; units that are not named keep 1. The control for any adaptive rule."""

    multipliers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.multipliers.items():
            if not 0.0 <= float(value) < float("inf"):
                raise LayerwiseError(
                    f"StaticRates: the multiplier of {name!r} is {value!r}: give a finite number >= 0"
                )

    def allocate(self, param: Tensor, units: Sequence[str]) -> State:
        state = super().allocate(param, units)
        values = [float(self.multipliers.get(unit, 1.0)) for unit in units]
        state["multiplier"].copy_(torch.tensor(values))
        return state
