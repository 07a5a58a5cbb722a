"""Final losses on a grid of base learning rates: the best rate, and whether the grid holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from layerwise.lab.report.style import Look


class LossesByRate:
    """What is asked of losses on a grid: `losses[lr]` has a value per seed, infinite or NaN for a diverged run."""

    losses: Mapping[float, Sequence[float]]

    def mean(self, lr: float) -> float:
        """Mean over seeds; infinite where any seed diverged or none has finished."""
        values = self.losses[lr]
        return fmean(values) if values and all(map(math.isfinite, values)) else math.inf

    @property
    def rates(self) -> list[float]:
        return sorted(self.losses)

    @property
    def best(self) -> float | None:
        """The rate of the lowest mean loss; None where every rate diverged."""
        rates = [lr for lr in self.rates if math.isfinite(self.mean(lr))]
        return min(rates, key=self.mean) if rates else None

    @property
    def edge(self) -> str | None:
        """`lowest` or `highest` where the best rate is the end of the grid, so that the optimum may lie beyond it.

        The best of the rates that converged is bracketed from above by one that diverged.
        """
        if self.best is None or len(self.rates) < 2:
            return None
        if self.best == self.rates[0]:
            return "lowest"
        return "highest" if self.best == self.rates[-1] else None

    def octaves(self, tolerance: float) -> str:
        """Factors of two of base rate within which the mean loss is within `tolerance` of the best, straight lines between
        points; `at least` as many where the grid ends, or a run diverged, before the loss passed that.
        """
        if self.best is None:
            return "at least 0.0"
        at, limit = self.rates.index(self.best), self.mean(self.best) + tolerance
        (below, opens), (above, opens_too) = (self._reach(rates, limit) for rates in (self.rates[at::-1], self.rates[at:]))
        return f"{'at least ' if opens or opens_too else ''}{below + above:.1f}"

    def _reach(self, rates: Sequence[float], limit: float) -> tuple[float, bool]:
        """Factors of two from the first rate in their direction to where the loss passes the limit, and whether that is
        open.
        """
        for inside, outside in pairwise(rates):
            low, high = self.mean(inside), self.mean(outside)
            if high > limit:
                part = (limit - low) / (high - low)  # 0 where the next one diverged
                width = abs(math.log2(inside / rates[0])) + part * abs(math.log2(outside / inside))
                return width, math.isinf(high)
        return abs(math.log2(rates[-1] / rates[0])), True


@dataclass(frozen=True)
class RateCurve(LossesByRate):
    """A contender's losses on its grid."""

    label: str
    look: Look
    losses: Mapping[float, Sequence[float]]
