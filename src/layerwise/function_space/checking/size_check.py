"""`SizeCheck`: how every module's step changes with the size of the model: slopes with errors, printed, saved, judged."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from layerwise.common.alike_names import siblings_of
from layerwise.common.files import save_as
from layerwise.common.group_by import group_by
from layerwise.common.text_table import aligned
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
#: The part of all rates' root sum of squares below which a module's rate is not judged. Matching has a stricter bound, by
#: the rounding of the numbers (`matching/decide.py`): a rate below that must not be divided by.
_NEGLIGIBLE = 1e-5
Verdict = Literal["flat", "grows", "shrinks", "unclear", "none"]


@dataclass(frozen=True)
class Value:
    """One measurement, and its standard error where that is known (else 0)."""

    value: float
    stderr: float = 0.0


#: What is measured at one step: quantity -> module -> value.
Readings = Mapping[Quantity, Mapping[str, Value]]


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
    """
    means = [_geometric_mean([v.value for v in values]) for values in found]
    slope: float | None = None
    stderr, freedom = 0.0, 0
    if all(mean > 0 and math.isfinite(mean) for mean in means):
        logs = [math.log(size) for size in sizes]
        centred = [x - fmean(logs) for x in logs]
        weights = [x / sum(c * c for c in centred) for x in centred]
        slope = sum(w * math.log(mean) for w, mean in zip(weights, means, strict=True))
        deviations, freedom = _deviations(found)
        stderr = math.hypot(*(w * d for w, d in zip(weights, deviations, strict=True)))
    elif any(means):
        slope = math.inf if means[-1] > means[0] or not math.isfinite(means[-1]) else -math.inf
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


def trends(sizes: Sequence[float], steps: Sequence[int], found: Sequence[Sequence[Mapping[int, Readings]]]) -> list[Trend]:
    """Of every quantity and module that all sizes have; `found[size][seed][step]`."""
    of_all = []
    for quantity in QUANTITIES:
        for step in steps:
            readings = [[seed[step][quantity] for seed in size] for size in found]
            if len({frozenset(values) for size in readings for values in size}) > 1:  # deeper models have other modules
                readings = [[_stacked(values, quantity) for values in size] for size in readings]
            silent = _negligible(readings) if quantity == "rate" else set()
            for module in readings[0][0]:
                if all(module in values for size in readings for values in size):
                    values = [[seed[module] for seed in size] for size in readings]
                    if module in silent:
                        values = [[Value(0.0) for _ in size] for size in values]
                    of_all.append(trend(module, quantity, step, sizes, values))
    return of_all


def _stacked(values: Mapping[str, Value], quantity: Quantity) -> dict[str, Value]:
    """The blocks of a stack as one, under a star for the number: rates are added, the rest is their root mean square."""
    stacks = {place: [values[name] for name in names] for place, names in group_by(values, siblings_of).items()}
    if quantity == "rate":
        return {
            name: Value(sum(v.value for v in blocks), sum(v.stderr**2 for v in blocks) ** 0.5)
            for name, blocks in stacks.items()
        }
    return {name: Value((sum(v.value**2 for v in blocks) / len(blocks)) ** 0.5) for name, blocks in stacks.items()}


def _negligible(readings: list[list[Mapping[str, Value]]]) -> set[str]:
    """Modules whose rate is next to nothing at every size, such as that of keys' biases: rounding noise has no slope."""
    largest: dict[str, float] = {}
    for size in readings:
        for values in size:
            total = sum(v.value**2 for v in values.values()) ** 0.5
            for name, v in values.items():
                part = v.value / total if total else 0.0
                largest[name] = max(largest.get(name, 0.0), math.inf if math.isnan(part) else part)
    return {name for name, part in largest.items() if part < _NEGLIGIBLE}


#: From the least to the most serious.
_ORDER: tuple[Verdict, ...] = ("none", "flat", "unclear", "shrinks", "grows")


@dataclass(frozen=True)
class SizeCheck:
    """What `check` found.

    Attributes:
        axis: what the sizes are: `width`, `depth`, `rank`, ...
        sizes, steps, seeds: what was run.
        trends: of every quantity of every module at every step.
        tolerance: the largest slope that counts as flat.
        judged: the quantity by which a module is judged.

    Examples:
        >>> def make(width):
        ...     return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2))
        >>> def adam(model):
        ...     return torch.optim.Adam(model.parameters(), lr=0.01)
        >>> _ = torch.manual_seed(0)
        >>> batch = torch.randn(64, 4), torch.randn(64, 2)
        >>> result = lw.check(make, (16, 64, 256), adam, batch, steps=(1,))
        >>> [round(abs(trend.slope), 2) for trend in result.of("update_rms")]  # entries move as far at every width,
        [0.0, 0.0]
        >>> result.passed, result.verdicts  # and there are more of them
        (False, {'0': 'grows', '1': 'grows'})
    """

    axis: str
    sizes: Sequence[float]
    steps: Sequence[int]
    seeds: Sequence[int]
    trends: Sequence[Trend]
    tolerance: float
    judged: Quantity = "rate"

    @property
    def passed(self) -> bool:
        """Whether no module grows or shrinks at any step, as far as the slopes' errors can tell."""
        return not any(verdict in ("grows", "shrinks") for verdict in self.verdicts.values())

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Of each module the most serious verdict over the steps, by the quantity that is judged."""
        found: dict[str, Verdict] = {}
        for trend in self.of(self.judged):
            verdict = trend.verdict(self.tolerance)
            found[trend.module] = max(found.get(trend.module, "none"), verdict, key=_ORDER.index)
        return found

    def of(self, quantity: Quantity, step: int | None = None) -> list[Trend]:
        """The trends of one quantity, at one step or all.

        Raises:
            LayerwiseError: a quantity or a step that was not measured.
        """
        if quantity not in QUANTITIES:
            raise LayerwiseError(f"quantity is {quantity!r}: use one of {', '.join(QUANTITIES)}")
        if step is not None and step not in self.steps:
            raise LayerwiseError(f"step {step} was not measured: use one of {', '.join(map(str, self.steps))}")
        return [t for t in self.trends if t.quantity == quantity and step in (None, t.step)]

    def judging(self, quantity: Quantity) -> SizeCheck:
        """The same measurements, judged by another quantity: `activation_change` is muP's coordinate check."""
        self.of(quantity)
        return replace(self, judged=quantity)

    def __str__(self) -> str:
        return self.table()

    def table(self, quantity: Quantity | None = None) -> str:
        """Slopes of one quantity (default: the one that is judged), a line a module, and what comes of it."""
        quantity = self.judged if quantity is None else quantity
        trends = self.of(quantity)
        modules = list(dict.fromkeys(trend.module for trend in trends))
        verdicts = self.judging(quantity).verdicts
        rows = [("module", *(f"step {step}" for step in self.steps), "")]
        for module in modules:
            row = {trend.step: trend for trend in trends if trend.module == module}
            verdict = "" if verdicts[module] == "none" else verdicts[module]
            rows.append((module, *(_slope(row.get(step)) for step in self.steps), verdict))
        lines = aligned(rows, right=range(1, len(self.steps) + 1))
        sizes = ", ".join(f"{size:g}" for size in self.sizes)
        lines.append(f"slope of log {QUANTITIES[quantity]} against log {self.axis} ({sizes}), with 95 % interval")
        return "\n".join(lines)

    def rows(self) -> Iterator[dict[str, object]]:
        """A row for each trend and size, as plain values: what `save` writes."""
        for trend in self.trends:
            for size, value in zip(trend.sizes, trend.values, strict=True):
                yield {
                    "module": trend.module,
                    "quantity": trend.quantity,
                    "step": trend.step,
                    self.axis: size,
                    "value": value,
                    "slope": trend.slope,
                    "slope_stderr": trend.stderr,
                    "verdict": trend.verdict(self.tolerance),
                }

    def save(self, path: str | Path) -> None:
        """Write a CSV file, a line for each module, quantity, step and size. Raises LayerwiseError where that cannot be."""
        rows, text = list(self.rows()), io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else ["module"])
        writer.writeheader()
        writer.writerows(rows)
        save_as(path, text.getvalue(), "table of the check")


def _slope(trend: Trend | None) -> str:
    if trend is None or trend.slope is None:
        return ""
    return f"{trend.slope:+.2f} ± {trend.margin:.2f}"
