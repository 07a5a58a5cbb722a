"""How a quantity changes with the size of a model: the slope of its logarithm against the size's, and its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from layerwise.errors import LayerwiseError
from layerwise.function_space.rates import student_quantile

Quantity = Literal["rate", "activation", "activation_change", "update_rms", "spectral"]
#: What is measured of each module, and what it is called in tables and figures.
QUANTITIES: dict[Quantity, str] = {
    "rate": "function-space rate",
    "activation": "RMS of activations",
    "activation_change": "RMS change of activations",
    "update_rms": "RMS of the update",
    "spectral": "spectral norm of the update",
}
#: The least slope that a parametrisation has which is not flat: theory's are multiples of it.
_NEXT_SLOPE = 0.5
Verdict = Literal["flat", "grows", "shrinks", "unclear", "none"]


@dataclass(frozen=True)
class Value:
    """One measurement, and its standard error where that is known (else 0)."""

    value: float
    stderr: float = 0.0


@dataclass(frozen=True)
class Trend:
    """One quantity of one module at one step, over the sizes.

    Attributes:
        module: its name; of stacks whose number of blocks is the size, with `*` for the number.
        quantity, step: what, and after how many optimizer steps.
        sizes: the sizes at which it was measured.
        values: at each size, the geometric mean over seeds.
        slope: least-squares slope of log value against log size; None where the value is 0, or negligible, at every size.
        stderr: the slope's standard error, from the spread between seeds, or that of the measurements where there is one
            seed; 0 where neither is known.
        freedom: degrees of freedom of that spread; 0 where it does not come from seeds.
    """

    module: str
    quantity: Quantity
    step: int
    sizes: Sequence[float]
    values: Sequence[float]
    slope: float | None
    stderr: float
    freedom: int = 0

    @property
    def margin(self) -> float:
        """Half of the slope's 95 % interval."""
        quantile = student_quantile(0.95, self.freedom) if self.freedom else 1.96
        return quantile * self.stderr

    def verdict(self, tolerance: float) -> Verdict:
        """`grows`, `shrinks`: all of the slope's 95 % interval is beyond the tolerance; `flat`: the slope is within it, and
        the interval leaves out 1/2 and more; `unclear`: neither: more seeds or sizes would tell; `none`: nothing to judge.
        """
        if self.slope is None:
            return "none"
        if abs(self.slope) - self.margin > tolerance:
            return "grows" if self.slope > 0 else "shrinks"
        known = abs(self.slope) + self.margin < max(_NEXT_SLOPE, tolerance)
        return "flat" if abs(self.slope) <= tolerance and known else "unclear"


def trend(module: str, quantity: Quantity, step: int, sizes: Sequence[float], found: Sequence[Sequence[Value]]) -> Trend:
    """The trend of `found`: for each size one value a seed.

    A value that is 0 at some sizes only has an infinite slope.

    Raises:
        LayerwiseError: fewer than two sizes.
    """
    if len(set(sizes)) < 2:
        raise LayerwiseError(f"sizes {list(sizes)}: give at least two different ones")
    means = [_geometric_mean([v.value for v in values]) for values in found]
    if not any(means):
        return Trend(module, quantity, step, sizes, means, None, 0.0)
    if not all(mean > 0 and math.isfinite(mean) for mean in means):
        grows = means[-1] > means[0] or not math.isfinite(means[-1])
        return Trend(module, quantity, step, sizes, means, math.inf if grows else -math.inf, 0.0)
    logs = [math.log(size) for size in sizes]
    centred = [x - fmean(logs) for x in logs]
    weights = [x / sum(c * c for c in centred) for x in centred]
    slope = sum(w * math.log(mean) for w, mean in zip(weights, means, strict=True))
    deviations, freedom = _deviations(found)
    stderr = math.hypot(*(w * d for w, d in zip(weights, deviations, strict=True)))
    return Trend(module, quantity, step, sizes, means, slope, stderr, freedom)


def _geometric_mean(values: Sequence[float]) -> float:
    if not all(value > 0 for value in values):
        return 0.0 if not any(math.isnan(value) for value in values) else math.nan
    return math.exp(fmean(map(math.log, values)))


def _deviations(found: Sequence[Sequence[Value]]) -> tuple[list[float], int]:
    """The standard error of each size's mean logarithm, and the degrees of freedom behind it.

    Several seeds: their spread, pooled over sizes, as two or three seeds alone say little about it; it holds the
    measurements' noise. One seed: the measurements' own errors.
    """
    freedom = sum(len(values) - 1 for values in found)
    if freedom:
        logs = [[math.log(v.value) for v in values] for values in found]
        squares = sum((x - fmean(row)) ** 2 for row in logs for x in row)
        return [math.sqrt(squares / freedom / len(row)) for row in logs], freedom
    errors = [values[0].stderr / values[0].value for values in found]
    return [error if math.isfinite(error) else 0.0 for error in errors], 0
