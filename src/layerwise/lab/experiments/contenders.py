"""What `compare` is told: a training run without its optimizer, and the contenders that take that place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, field_validator, model_validator

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import Config, OptimizerConfig, Section, one_folder
from layerwise.lab.config.validate import nearest, validate
from layerwise.lab.experiments.tuning import Search
from layerwise.lab.optimizers.registry import default_rate, find_preset, optimizers
from layerwise.lab.report.grouping import looks, optimizer_title
from layerwise.lab.report.style import Look

#: Rates or factors to try.
Grid = Annotated[list[PositiveFloat], Field(min_length=1)]
DEFAULT = ("adamw", "lanton", "d-muon", "dual-muon")
AUTO_STEPS = 2  # grid points of `auto` on each side of the default rate, a factor of two apart


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
        if isinstance(grid, str) and grid != "auto":
            raise ValueError(f"compare.lr_grid={grid!r}: give auto, or rates by contender such as lanton=[2e-3, 4e-3]")
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
