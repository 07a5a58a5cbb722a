"""Compare optimizers: the same model, initial weights and batches for each, at given rates or each at its best of a grid.

Runs lie side by side in one folder and are told apart by their config alone (`identity`): one that has ended is never
repeated, one that was interrupted goes on, whatever the command that asks for it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from layerwise.errors import LayerwiseError
from layerwise.lab.config.read import nearest, validate
from layerwise.lab.config.schema import Config, OptimizerConfig, Section
from layerwise.lab.optimizers.default_rates import base_rates, default_rate, plain_preset
from layerwise.lab.optimizers.registry import OPTIMIZERS, find_preset
from layerwise.lab.report import Contender, RateCurve, RunData
from layerwise.lab.report.names import looks, optimizer_title
from layerwise.lab.runs.directory import Run, find_runs, has_ended, read_run
from layerwise.lab.training.progress import Progress, ProgressKind, make_progress
from layerwise.lab.training.resume import flatten
from layerwise.lab.training.run import complete, train

DEFAULT = ("adamw", "d-muon", "scion", "lanton")
AUTO_STEPS = 2  # grid points on each side of the default rate, a factor of two apart
AUTO_EXTENSIONS = 4  # further points at most, where the best lies at an end
# What a run is written to, how often it is saved and by how many processes does not change what it is.
_NOT_IDENTITY = ("run.", "parallel.", "training.keep", "training.checkpoint_every")


class CompareSection(Section):
    """What is compared, over which seeds and rates."""

    optimizers: list[str] = Field(
        list(DEFAULT),
        min_length=1,
        description="contenders: optimizers by name, or names given in `contenders`; where none are listed,"
        " the defaults and all of those",
    )
    contenders: dict[str, dict[str, Any]] = Field(
        {},
        description="contender -> its `optimizer` section, where it is more than a name (`name`: the optimizer)",
    )
    seeds: int = Field(
        1, ge=1, description="runs of each contender: seeds training.seed, training.seed + 1, ..."
    )
    lr_grid: Literal["auto"] | dict[str, list[float]] | None = Field(
        None,
        description="contender -> base rates to try; `auto`: factors of two around the default rate, as many as it takes"
        " for the best not to be the first or last; null: the default rates alone",
    )

    @model_validator(mode="before")
    @classmethod
    def _grids_by_name(cls, data: Any) -> Any:
        """`compare: {lanton: [1e-3, 2e-3]}` stands for `compare: {lr_grid: {lanton: [1e-3, 2e-3]}}`."""
        if not isinstance(data, dict):
            return data
        grid = data.get("lr_grid")
        if isinstance(grid, str) and grid != "auto":
            raise ValueError(
                f"compare.lr_grid={grid!r}: give auto, or rates by contender such as lanton=[2e-3, 4e-3]"
            )
        known = set(OPTIMIZERS) | set(data.get("contenders") or {})
        grids = {k: v for k, v in data.items() if k in known and isinstance(v, list)}
        rest = {k: v for k, v in data.items() if k not in grids}
        if grids and not isinstance(rest.get("lr_grid"), str):
            rest["lr_grid"] = {**(rest.get("lr_grid") or {}), **grids}
        return rest

    @model_validator(mode="after")
    def _rates(self) -> Self:
        for name, rates in (self.lr_grid if isinstance(self.lr_grid, dict) else {}).items():
            if not rates or any(not rate > 0 or math.isinf(rate) for rate in rates):
                raise ValueError(f"compare.lr_grid.{name}={rates}: give one or more positive rates")
        return self


class CompareConfig(Config):
    """A training run without its optimizer, and the contenders that take that place."""

    compare: CompareSection = Field(default_factory=lambda: CompareSection.model_validate({}))

    @property
    def folder(self) -> Path:
        """Where runs and report are written: `run.dir/run.name`, the name being `compare` by default."""
        return Path(self.run.dir).expanduser() / (self.run.name or "compare")


@dataclass(frozen=True)
class Entry:
    """A contender: its name, its optimizer, its rates, and whether the grid may be extended."""

    name: str
    optimizer: OptimizerConfig
    rates: tuple[float, ...]
    may_extend: bool

    @property
    def label(self) -> str:
        return optimizer_title(self.name)


@dataclass
class Outcome:
    """All runs of one contender: base rate -> a run per seed."""

    entry: Entry
    runs: dict[float, list[Run]] = field(default_factory=dict)

    def curve(self, look: Any) -> RateCurve:
        losses = {lr: [RunData(run).final_val_loss for run in runs] for lr, runs in self.runs.items()}
        return RateCurve(self.entry.label, look, losses)


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns: each contender at its best rate, all losses on the grids, and what to note."""

    contenders: list[Contender]
    curves: list[RateCurve]
    tuned: bool
    notes: list[str]


def entries(config: CompareConfig) -> list[Entry]:
    """The contenders of a config. Raises LayerwiseError for a name that is neither an optimizer nor a contender."""
    section = config.compare
    if config.optimizer != OptimizerConfig.model_validate({}):
        raise LayerwiseError(
            "optimizer: `compare` sets it for each contender; write compare.contenders.NAME instead,"
            " for example compare.contenders.adamw.lr=1e-3"
        )
    names = list(section.optimizers)
    if "optimizers" not in section.model_fields_set:  # a list of one's own is meant as it stands
        names += [name for name in section.contenders if name not in OPTIMIZERS]
    grids = section.lr_grid if isinstance(section.lr_grid, dict) else {}
    for name in [*names, *grids]:
        if name not in OPTIMIZERS and name not in section.contenders:
            valid = [*OPTIMIZERS, *section.contenders]
            raise LayerwiseError(f"compare: unknown optimizer {name!r}: {nearest(name, valid)}")
    if len(set(names)) < len(names):
        raise LayerwiseError(f"compare.optimizers={','.join(names)}: each contender once")
    return [_entry(config, name, grids) for name in names]


def _entry(config: CompareConfig, name: str, grids: Mapping[str, Sequence[float]]) -> Entry:
    settings = {"name": name, **config.compare.contenders.get(name, {})}
    section = f"compare.contenders.{name}"
    optimizer = validate(OptimizerConfig, settings, f"{section}.")
    find_preset(optimizer, section)
    start = default_rate(config.model, optimizer.name) if optimizer.lr is None else optimizer.lr
    if name in grids:
        return Entry(name, optimizer, tuple(sorted(set(grids[name]))), may_extend=False)
    if config.compare.lr_grid == "auto":
        if start == 0:
            raise LayerwiseError(
                f"{section}.lr=0: compare.lr_grid=auto looks around a rate above 0; leave one out"
            )
        points = range(-AUTO_STEPS, AUTO_STEPS + 1)
        return Entry(name, optimizer, tuple(start * 2.0**k for k in points), may_extend=True)
    return Entry(name, optimizer, (start,), may_extend=False)


def identity(config: Mapping[str, Any]) -> str:
    """The hash of a complete config (as run.json has it), leaving out where the run is written and how it is saved."""
    flat = {k: v for k, v in flatten(dict(config)).items() if not k.startswith(_NOT_IDENTITY)}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


class RunStore:
    """The runs in a folder, found by their config."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        for path in find_runs(folder) if folder.is_dir() else ():
            try:
                self._paths[identity(read_run(path).config)] = path
            except LayerwiseError:
                continue  # not a run we could use; its folder's name stays taken

    def place(self, config: Config, stem: str) -> Config:
        """The config with the directory of its run: the one it has already, or a free one named after `stem`."""
        key = identity(complete(config).model_dump())
        if key not in self._paths:
            number = 1
            while (
                self.folder / f"{stem}-{number}"
            ).exists() or self.folder / f"{stem}-{number}" in self._paths.values():
                number += 1
            self._paths[key] = self.folder / f"{stem}-{number}"
        path = self._paths[key]
        return config.replace({"run.dir": str(path.parent), "run.name": path.name})


class _Titled:
    """A run's progress under a title of ours."""

    def __init__(self, shown: Progress, title: str) -> None:
        self._shown, self._title = shown, title

    def start(self, title: str, total: int, done: int) -> None:
        self._shown.start(self._title, total, done)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shown, name)


def compare(
    config: CompareConfig, *, progress: ProgressKind = "auto", say: Callable[[str], None] = lambda _: None
) -> Comparison:
    """Run what is missing of a comparison, and return all of it. `say` is told in a line what happens.

    Raises LayerwiseError before anything is trained where the config cannot be run.
    """
    listed = entries(config)
    store = RunStore(config.folder)
    total = sum(len(entry.rates) for entry in listed) * config.compare.seeds
    say(
        f"{total} run{'s' if total != 1 else ''} of {config.steps} steps, {config.tokens_per_step:,} tokens a step"
    )
    outcomes = []
    for entry in listed:
        outcome = Outcome(entry)
        outcomes.append(outcome)
        for rate in entry.rates:
            outcome.runs[rate] = _run_seeds(config, entry, rate, store, progress, say)
        for _ in range(AUTO_EXTENSIONS if entry.may_extend else 0):
            further = _beyond(outcome)
            if further is None:
                break
            say(f"{entry.label}: the best rate is at the end of the grid; trying {further:g}")
            outcome.runs[further] = _run_seeds(config, entry, further, store, progress, say)
    return _conclude(config, outcomes)


def _beyond(outcome: Outcome) -> float | None:
    """The next rate outside a grid whose best is at its end; None where the best lies inside."""
    curve = outcome.curve(None)
    if curve.best is None:
        return curve.rates[0] / 2
    return {None: None, "lowest": curve.rates[0] / 2, "highest": curve.rates[-1] * 2}[curve.edge]


def _run_seeds(
    config: CompareConfig,
    entry: Entry,
    rate: float,
    store: RunStore,
    progress: ProgressKind,
    say: Callable[[str], None],
) -> list[Run]:
    runs = []
    for seed in range(config.training.seed, config.training.seed + config.compare.seeds):
        tree = config.model_dump(exclude={"compare"})
        tree["optimizer"] = {**entry.optimizer.model_dump(), "lr": rate}
        tree["training"] |= {"seed": seed, "keep": 1}
        placed = store.place(validate(Config, tree), entry.name)
        title = f"{entry.label}, rate {rate:.3g}" + (f", seed {seed}" if config.compare.seeds > 1 else "")
        ended = has_ended(placed.run_path)
        shown: Any = _Titled(make_progress(progress), title)
        run = train(placed, resume=True, progress=shown)
        if ended:
            loss = RunData(run).final_val_loss
            say(
                f"{title}: done before, {run.status}"
                + (f", validation loss {loss:.4f}" if math.isfinite(loss) else "")
            )
        runs.append(run)
    return runs


def _conclude(config: CompareConfig, outcomes: Sequence[Outcome]) -> Comparison:
    chosen = looks([outcome.entry.optimizer.name for outcome in outcomes])
    curves = [outcome.curve(look) for outcome, look in zip(outcomes, chosen, strict=True)]
    groups = []
    for outcome, curve, look in zip(outcomes, curves, chosen, strict=True):
        rate = curve.best if curve.best is not None else curve.rates[0]
        groups.append(Contender(outcome.entry.label, look, tuple(RunData(run) for run in outcome.runs[rate])))
    tuned = any(len(curve.rates) > 1 for curve in curves)
    return Comparison(groups, curves, tuned, list(_notes(config, curves, tuned)))


def _notes(config: CompareConfig, curves: Sequence[RateCurve], tuned: bool) -> Iterable[str]:
    if tuned:
        seeds = config.compare.seeds
        yield (
            f"Each optimizer is shown at the best base rate of its grid, over {seeds} seed{'s' if seeds > 1 else ''}, all "
            "runs with the same schedule length. The rate was chosen by the same validation loss that is reported."
        )
        for curve in curves:
            if curve.edge is not None:
                yield (
                    f"{curve.label}: the best rate, {curve.best:g}, is the {curve.edge} of its grid; its optimum may lie "
                    "beyond it, so its result is not its best."
                )
            elif len(curve.rates) == 1:
                yield f"{curve.label}: only one rate was tried; it was not tuned."
            if curve.best is None:
                yield f"{curve.label}: diverged at every rate; it is shown at the lowest."
        return
    entry = base_rates().get(plain_preset(config.model) or "", {})
    if entry.get("command"):
        yield (
            "Base rates were not tuned in this run: they are the defaults for this model, found by "
            f"`{entry['command']}`. With other settings than those, the ranking may be one of rates, not of optimizers."
        )
    else:
        yield (
            "Base rates were not tuned in this run: they are untuned starting values, so the ranking may be one of rates, "
            "not of optimizers. `layerwise compare --lr-grid auto` tunes each optimizer on its own grid."
        )


def curve_rows(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Every rate of every grid with its losses over seeds, for a table."""
    return [
        (
            curve.label,
            f"{lr:g}",
            ", ".join(f"{v:.4f}" if math.isfinite(v) else "diverged" for v in curve.losses[lr]),
        )
        for curve in comparison.curves
        for lr in curve.rates
    ]


def rates_file(config: CompareConfig, comparison: Comparison, command: str) -> str | None:
    """The best rates as an entry of base_rates.yaml; those at the end of a grid are left out.

    None where no rate was tuned, or where the model is no preset as it is, so that no entry could stand for it.
    """
    preset = plain_preset(config.model)
    if preset is None or not comparison.tuned:
        return None
    lines = [
        f"{preset}:",
        f"  command: {json.dumps(command)}",
        "  rates:",
    ]
    for group, curve in zip(comparison.contenders, comparison.curves, strict=True):
        if len(curve.rates) > 1 and curve.best is not None and curve.edge is None:
            lines.append(f"    {group.optimizer}: {curve.best!r}")
    return "\n".join(lines) + "\n"
