"""Rates from the dual norm of the direction that the step goes along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from layerwise.optim.rules.rule import Fraction, NormGroup, RateRule, register_rule, weighted_median
from layerwise.optim.work.job import State

#: A norm above it is taken for it, so that squares stay finite in float32: an average that held an infinity once is lost.
LARGEST_NORM = 1e18


Steps = Annotated[int, "a whole number from 1 up", lambda number: number >= 1]
Softening = Annotated[float, "a number in [1e-06, 1e+06)", lambda number: 1e-6 <= number < 1e6]


@register_rule("dual_norm_adaptive")
@dataclass(frozen=True)
class DualNormAdaptive(RateRule):
    """The larger the dual norm of a unit's direction, against the others of its group, the smaller its rate.

    With ``u`` what the step goes along (the momentum, or Nesterov's look-ahead), for each unit

        n = <u, lmo(u)> / white_noise          its dual norm, over that of white noise in its shape
        H <- beta H + (1 - beta) n^2           H starts at the first n^2; every few steps
        multiplier = ((1 + softening) m / (softening m + H))^(1/4)

    where ``m`` is the median of H over the norm group, units weighted by their number of entries. A step uses the H of
    the steps before it. This is LANTON's formula (arXiv 2510.14009), ``alpha^2 = softening m``, with three changes, all
    ours: the norm is the direction's own instead of a difference's, so the step computes it anyway and no gradient is
    kept; it is free of the shape; and the unit in the middle of the group keeps 1, so the base rate keeps its meaning.

    A unit that has had no gradient yet (``H = 0``) has 1 and does not count in ``m``.

    Args:
        softening: how far below the median, in squares, a norm stops to matter. At 0.1 a multiplier is at most 1.82, and
            0.57 at three times the median norm, 0.32 at ten times.
        beta: weight of the old average of H: with ``every`` 0.8 and 4 for an average over twenty steps.
        every: steps from one n to the next. H moves slowly, and n at every step is 3 to 10 % of a step's time on a CPU.

    Examples:
        >>> import torch, layerwise as lw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
        >>> optimizer = lw.DMuon(lw.param_groups(model), rates=lw.DualNormAdaptive())
    """

    softening: Softening = 0.1
    beta: Fraction = 0.8
    every: Steps = 4
    unit_state: ClassVar = ("squared_norm", "size")  # H, and the number of entries
    own_dual_norm: ClassVar = True

    def squared_norm(self, state: State) -> Tensor:
        return torch.where(state["squared_norm"] > 0, state["squared_norm"], float("nan"))

    def update(self, units: NormGroup) -> Mapping[str, Tensor]:
        square = units.norms[0].nan_to_num(nan=LARGEST_NORM).clamp(max=LARGEST_NORM).square()
        old = units.state["squared_norm"]
        average = torch.where(old > 0, torch.lerp(square, old, self.beta), square)
        new = torch.where(units.present, average, old)
        return {"squared_norm": new, "multiplier": self.multipliers(new, units.state["size"])}

    def multipliers(self, squared_norm: Tensor, size: Tensor) -> Tensor:
        """The multipliers of a group, ``[units]``, from H and the number of entries of each unit."""
        signal = squared_norm > 0
        median = weighted_median(squared_norm, size * signal)
        relative = squared_norm / median  # nan where all are 0
        slower = (relative + self.softening).div_(1 + self.softening).pow_(-0.25)
        return torch.where(signal, slower, 1.0)
