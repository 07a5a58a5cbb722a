"""NAMO's rate per matrix, the closest rival of LANTON's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.geometry import Frobenius
from layerwise.optim.rules.rule import Fraction, NonNegative, NormGroup, RateRule, register_rule
from layerwise.optim.work.job import State
from layerwise.optim.work.local import DIRECTIONS, GRADIENTS, DualNorm

#: Its square is still a float32: an average that held an infinity once would be NaN ever after.
LARGEST_NORM = 1e19
# Made here: torch.compile cannot follow a class that checks its arguments.
_NORMS = [DualNorm(GRADIENTS, Frobenius()), DualNorm(DIRECTIONS, Frobenius())]


@register_rule("norm_adaptive")
@dataclass(frozen=True)
class NormAdaptive(RateRule):
    """NAMO's scalar per matrix (arXiv 2602.17080): a signal-to-noise ratio in the Frobenius norm, no gradient buffer.

    ``v <- beta2 v + (1 - beta2) ||G||_F^2``; multiplier
    ``sqrt(1 - beta2^t) / (1 - beta1^t) * ||M||_F / (sqrt(v) + eps)``, at most ``ceiling``, where M is what the step is
    taken along and beta1 the momentum's weight. It belongs on steps scaled by 0.2 sqrt(max(d_out, d_in)) (``DMuon``).

    Examples:
        >>> optimizer = lw.DMuon(lw.param_groups(nn.Linear(4, 8)), rates=lw.NormAdaptive())
    """

    beta2: Fraction = 0.99
    eps: NonNegative = 1e-8
    ceiling: NonNegative = 1.0
    unit_state: ClassVar = ("second_moment", "gradients_seen", "beta1_power")

    def allocate(self, param: Tensor, units: Sequence[str], sizes: Sequence[int]) -> State:
        state = super().allocate(param, units, sizes)
        state["beta1_power"].fill_(1.0)
        return state

    def norms(self) -> Sequence[DualNorm]:
        return _NORMS

    def update(self, units: NormGroup) -> Mapping[str, Tensor]:
        gradient, direction = units.norms.clamp(max=LARGEST_NORM)
        present, old, power = units.present, units.state["second_moment"], units.state["beta1_power"]
        count = units.state["gradients_seen"] + present
        second = torch.where(present, torch.lerp(gradient.square(), old, self.beta2), old)
        power = torch.where(present, power * units.momentum, power)
        correction = (1.0 - self.beta2**count).sqrt() / (1.0 - power)
        multiplier = (correction * direction / (second.sqrt() + self.eps)).clamp(max=self.ceiling)
        return {
            "second_moment": second,
            "gradients_seen": count,
            "beta1_power": power,
            "multiplier": torch.where(present, multiplier, units.state["multiplier"]),
        }
