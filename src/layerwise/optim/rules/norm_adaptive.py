"""Rate rules that are not LANTON's: its closest rival, and the control for any adaptive rule."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.geometry import Frobenius
from layerwise.optim.rules.rule import (
    Gradients,
    RateRule,
    Reading,
    State,
    UnitReadings,
    check_number,
    gather,
    scatter,
    stack_readings,
)

#: Its square is still a float32: an average that held an infinity once would be NaN ever after.
LARGEST_NORM = 1e19


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

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("beta2", self.beta2, 0.0, 1.0),
            ("eps", self.eps, 0.0, float("inf")),
            ("ceiling", self.ceiling, 0.0, float("inf")),
        ):
            check_number("NormAdaptive", name, value, low, high)
            object.__setattr__(self, name, float(value))

    def allocate(self, param: Tensor, units: Sequence[str]) -> State:
        state = super().allocate(param, units)
        for key in ("second_moment", "gradients_seen", "beta1_power"):
            state[key] = torch.zeros_like(state["multiplier"])
        state["beta1_power"].fill_(1.0)
        return state

    def readings(self, seen: Gradients, state: State) -> list[Reading]:
        return [Reading(Frobenius(), lambda: seen.grad), Reading(Frobenius(), seen.direction_input)]

    def update(self, units: Sequence[UnitReadings], keep: Tensor | None) -> None:
        norms, present = stack_readings(units)
        norms = norms.clamp(max=LARGEST_NORM)
        old, power = gather(units, "second_moment"), gather(units, "beta1_power")
        beta1 = torch.cat([torch.full_like(unit.state["multiplier"], unit.momentum) for unit in units]).to(
            power
        )
        count = gather(units, "gradients_seen") + present
        second = torch.where(present, torch.lerp(norms[0].square(), old, self.beta2), old)
        power = torch.where(present, power * beta1, power)
        correction = (1.0 - self.beta2**count).sqrt() / (1.0 - power)
        multiplier = (correction * norms[1] / (second.sqrt() + self.eps)).clamp(max=self.ceiling)
        new = {"second_moment": second, "gradients_seen": count, "beta1_power": power}
        new["multiplier"] = torch.where(present, multiplier, gather(units, "multiplier"))
        for key, values in new.items():
            scatter(units, key, values, keep)


@dataclass(frozen=True)
class StaticRates(RateRule):
    """Fixed multipliers by unit name; units that are not named keep 1. The control for any adaptive rule."""

    multipliers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.multipliers, Mapping):
            raise LayerwiseError(
                f"StaticRates({self.multipliers!r}): give multipliers by unit name, such as {{'head.weight': 0.5}}"
            )
        for name, value in self.multipliers.items():
            check_number("StaticRates", f"multipliers[{name!r}]", value, 0.0, float("inf"))
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
            near = difflib.get_close_matches(name, [*ruled, *others], n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"units look like {ruled[0]!r}"
            raise LayerwiseError(f"StaticRates: no unit is named {name!r} (given {value:g}): {hint}")

    def allocate(self, param: Tensor, units: Sequence[str]) -> State:
        state = super().allocate(param, units)
        values = [float(self.multipliers.get(unit, 1.0)) for unit in units]
        state["multiplier"].copy_(torch.tensor(values))
        return state
