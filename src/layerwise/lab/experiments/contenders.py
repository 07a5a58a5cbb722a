"""What `compare` is told: a training run without its optimizer, and the contenders that take that place; how one is tuned.

A trial is a `Point`, run once for each seed. The search is coordinate by coordinate: the base rates of the grid, each
role's factors at the best point so far, the base rate again. What is left of the budget goes into finer base rates, so
that contenders without roles get as many trials as those that have some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, field_validator, model_validator

from layerwise.errors import LayerwiseError
from layerwise.lab.config.keys import nearest, validate
from layerwise.lab.config.schema import Config, OptimizerConfig, Section, one_folder
from layerwise.lab.optimizers.registry import default_rate, find_preset, optimizers
from layerwise.lab.report import Contender, RateCurve
from layerwise.lab.report.grouping import looks, optimizer_title
from layerwise.lab.report.style import Look
from layerwise.lab.runs.recorded import Run

#: Rates or factors to try.
Grid = Annotated[list[PositiveFloat], Field(min_length=1)]
DEFAULT = ("adamw", "lanton", "d-muon", "dual-muon")
AUTO_STEPS = 2  # grid points of `auto` on each side of the default rate, a factor of two apart
AUTO_EXTENSIONS = 4  # points beyond a grid of `auto` at most, where the best lies at an end


class CompareSection(Section):
    """What is compared, over which seeds and rates."""

    optimizers: list[str] = Field(default=list(DEFAULT), min_length=1)
    """contenders: optimizers by name, or names given in `contenders`; where none are listed, the defaults and
    all of those"""
    contenders: dict[str, dict[str, Any]] = Field(default={})
    """contender -> its `optimizer` section, where it is more than a name (`name`: the optimizer)"""
    seeds: int = Field(default=1, ge=1, le=1000)
    """runs of each contender: seeds training.seed, training.seed + 1, ..."""
    lr_grid: Literal["auto"] | dict[str, Grid] | None = None
    """contender -> base rates to try; `auto`: factors of two around the default rate, as many as it takes for
    the best not to be the first or last; null: the default rates alone"""
    roles: dict[str, Grid] = Field(default={})
    """role -> factors to try on the rate of its parameters, one role after the other, for those of `by_role`"""
    by_role: list[str] = Field(default=[])
    """contenders that are also shown tuned by role, as contenders of their own (`d-muon-by-role`)"""
    trials: int | None = Field(default=None, ge=1, le=10_000)
    """trials of each contender (base rates and factors, each over all seeds), the same for all; what the grids
    leave of it goes into finer base rates; null: as many as the grids ask for"""
    baseline: str | None = None
    """contender that the others are measured against; null: the best of them"""
    lengths: list[PositiveFloat] = Field(default=[])
    """lengths at which the baseline is also run at its best rate, as fractions of the steps (`[0.85, 1.15, 1.3]`),
    which show how many tokens a difference in loss is worth"""

    @field_validator("lr_grid", mode="before")
    @classmethod
    def _auto_or_rates(cls, grid: Any) -> Any:
        if grid not in ("auto", None) and not isinstance(grid, dict):
            raise ValueError(f"compare.lr_grid={grid!r}: give auto, or rates by contender such as {{lanton: [2e-3, 4e-3]}}")
        return grid

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in self.contenders:
            one_folder(name, "compare.contenders")  # its runs are named after it
        if bool(self.roles) != bool(self.by_role):
            raise ValueError(
                "compare.roles are the factors that the contenders of compare.by_role try: give both, such as"
                " roles={head: [1, 2, 4]} and by_role=[d-muon]"
            )
        if self.lengths and self.baseline is None:
            raise ValueError("compare.lengths are lengths of the baseline's runs: give compare.baseline too")
        return self


class CompareConfig(Config):
    """A training run without its optimizer, and the contenders that take that place."""

    compare: CompareSection = CompareSection()

    @property
    def run_name(self) -> str:
        """Of the folder of runs and report: `run.name`, or `compare`."""
        return self.run.name or "compare"


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


def entries(config: CompareConfig) -> list[Search]:
    """The contenders of a config. Raises LayerwiseError for a name that is neither an optimizer nor a contender."""
    section = config.compare
    if config.optimizer != OptimizerConfig.model_validate({}):
        raise LayerwiseError(
            "optimizer: `compare` sets it for each contender; write compare.contenders.NAME instead,"
            " for example compare.contenders.adamw.lr=1e-3"
        )
    names = list(section.optimizers)
    if "optimizers" not in section.model_fields_set:  # a list of one's own is meant as it stands
        names += [name for name in section.contenders if name not in optimizers()]
    grids = section.lr_grid if isinstance(section.lr_grid, dict) else {}
    for name in [*names, *grids, *section.by_role]:
        if name not in optimizers() and name not in section.contenders:
            valid = [*optimizers(), *section.contenders]
            raise LayerwiseError(f"compare: unknown optimizer {name!r}: {nearest(name, valid)}")
    if len(set(names)) < len(names):
        raise LayerwiseError(f"compare.optimizers={','.join(names)}: each contender once")
    found = [_entry(config, name, grids) for name in names]
    for name in section.by_role:  # the runs that both have are made once
        tuned = _entry(config, name, grids)
        tuned.name, tuned.label, tuned.roles = f"{name}-by-role", f"{tuned.label} by role", section.roles
        found.append(tuned)
    for entry, look in zip(found, looks([entry.optimizer.name for entry in found]), strict=True):
        entry.look = look
        least = len(entry.rates) + sum(map(len, entry.roles.values()))
        if section.trials is not None and section.trials < least:
            raise LayerwiseError(
                f"compare.trials={section.trials}: {entry.label} has {least} base rates and factors to try;"
                f" give trials={least} or more, or fewer of those"
            )
    if section.baseline is not None and section.baseline not in (known := [entry.name for entry in found]):
        raise LayerwiseError(f"compare.baseline={section.baseline!r}: {nearest(section.baseline, known)}")
    return found


def _entry(config: CompareConfig, name: str, grids: Mapping[str, Sequence[float]]) -> Search:
    settings = {"name": name, **config.compare.contenders.get(name, {})}
    section = f"compare.contenders.{name}"
    optimizer = validate(OptimizerConfig, settings, f"{section}.")
    find_preset(optimizer, section)
    start = default_rate(config.model, optimizer.name) if optimizer.lr is None else optimizer.lr
    automatic = config.compare.lr_grid == "auto"
    if automatic and start == 0:
        raise LayerwiseError(f"{section}.lr=0: compare.lr_grid=auto looks around a rate above 0; leave one out")
    around = range(-AUTO_STEPS, AUTO_STEPS + 1) if automatic else [0]
    rates = sorted(set(grids[name])) if name in grids else [start * 2.0**k for k in around]
    return Search(name, optimizer_title(name), Look(""), optimizer, rates, automatic, config.compare.trials)
