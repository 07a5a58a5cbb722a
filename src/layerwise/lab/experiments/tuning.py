"""How a contender is tuned: base rates, then factors of roles one after the other, up to a number of trials.

A trial is a `Point`, run once for each seed. The search is coordinate by coordinate: the base rates of the grid, each
role's factors at the best point so far, the base rate again. What is left of the budget goes into finer base rates, so
that contenders without roles get as many trials as those that have some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from layerwise.lab.config.schema import OptimizerConfig
from layerwise.lab.report import Contender, RateCurve
from layerwise.lab.report.style import Look
from layerwise.lab.runs.recorded import Run

AUTO_EXTENSIONS = 4  # points beyond a grid of `auto` at most, where the best lies at an end


@dataclass(frozen=True)
class Point:
    """A base rate, and factors on it by role: only those that are not 1."""

    lr: float
    factors: tuple[tuple[str, float], ...] = ()

    def with_factor(self, role: str, factor: float) -> Point:
        others = {**dict(self.factors), role: factor}
        return replace(self, factors=tuple(sorted((r, f) for r, f in others.items() if f != 1.0)))

    def __str__(self) -> str:
        return ", ".join([f"rate {self.lr:.3g}", *(f"{role} x {factor:g}" for role, factor in self.factors)])


@dataclass
class Search:
    """A contender: what it tries, its trials, and what is best of them.

    Attributes:
        name: in configs.
        label: in tables and figures.
        look: how it is drawn.
        optimizer: what it is.
        rates: base rates to try.
        may_extend: whether that grid may grow.
        trials: points to run, neither more nor fewer, at least as many as the grids hold; None: what they ask for.
        roles: factors to try by role.
        runs: point -> a run per seed, in the order in which they were asked for.
    """

    name: str
    label: str
    look: Look
    optimizer: OptimizerConfig
    rates: Sequence[float]
    may_extend: bool
    trials: int | None
    roles: Mapping[str, Sequence[float]] = field(default_factory=dict)
    runs: dict[Point, list[Run]] = field(default_factory=dict)

    def curve_at(self, factors: tuple[tuple[str, float], ...]) -> RateCurve:
        """Losses by base rate, of the points that have these factors."""
        same = {point.lr: runs for point, runs in self.runs.items() if point.factors == factors}
        losses = {lr: [run.final_val_loss for run in runs] for lr, runs in same.items()}
        return RateCurve(self.label, self.look, losses)

    @property
    def best(self) -> Point:
        """The point of the lowest mean loss; the lowest rate without factors where all diverged."""
        curves = {point.factors: self.curve_at(point.factors) for point in self.runs}
        means = {point: curves[point.factors].mean(point.lr) for point in self.runs}
        return min(means, key=lambda point: (means[point], bool(point.factors), point.lr))

    @property
    def curve(self) -> RateCurve:
        """Losses by base rate, at the best factors."""
        return self.curve_at(self.best.factors)

    @property
    def at_best(self) -> Contender:
        return Contender(self.label, self.look, tuple(self.runs[self.best]))

    @property
    def left(self) -> float:
        """Trials that are not spent."""
        return math.inf if self.trials is None else self.trials - len(self.runs)

    def points(self, say: Callable[[str], None]) -> Iterator[Point]:
        """All points that the contender is to have; each is to be in `runs` when the next is asked for, and may be before.

        `say` is told in a line where the grid grows.
        """
        yield from map(Point, self.rates)
        if self.may_extend:
            yield from self.further(say, kept=sum(map(len, self.roles.values())))
        for role, factors in self.roles.items():
            for factor in factors:
                yield self.best.with_factor(role, factor)
        if self.roles:
            yield from self.further(say)  # with factors the best base rate is another
        while self.trials is not None and self.left > 0:
            yield replace(self.best, lr=finer(self.curve))

    def further(self, say: Callable[[str], None], kept: int = 0) -> Iterator[Point]:
        """Base rates beyond a grid whose best is at its end, at the best factors; `kept`: trials to be left over."""
        for _ in range(AUTO_EXTENSIONS):
            further = beyond(self.curve)
            if further is None or self.left <= kept:
                return
            say(f"{self.label}: the best rate is at the end of the grid; trying {further:g}")
            yield replace(self.best, lr=further)


def beyond(curve: RateCurve) -> float | None:
    """The next rate outside a grid whose best is at its end; None where the best lies inside."""
    if curve.best is None or len(curve.rates) == 1:
        return curve.rates[0] / 2
    return {None: None, "lowest": curve.rates[0] / 2, "highest": curve.rates[-1] * 2}[curve.edge]


def finer(curve: RateCurve) -> float:
    """The rate most worth trying next: beyond an open end, else in the middle of the wider gap beside the best."""
    outside = beyond(curve)
    if outside is not None:
        return outside
    at = curve.rates.index(curve.best)  # type: ignore[arg-type]
    below, best, above = curve.rates[at - 1 : at + 2]
    return (best * (below if best / below > above / best else above)) ** 0.5
