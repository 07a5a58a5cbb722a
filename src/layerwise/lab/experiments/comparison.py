"""Compare optimizers: the same model, initial weights and batches for each, at given rates or each at its best of a grid.

Runs lie side by side in one folder and are found again by their config (`RunStore`): one that has ended is never
repeated, one that was interrupted goes on, whatever the command that asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerwise.lab.config.schema import Config
from layerwise.lab.config.validate import validate
from layerwise.lab.experiments.comparison_notes import notes
from layerwise.lab.experiments.contenders import CompareConfig, Entry, entries
from layerwise.lab.experiments.store import RunStore
from layerwise.lab.report import Contender, RateCurve
from layerwise.lab.report.names import looks
from layerwise.lab.report.style import Look
from layerwise.lab.runs.directory import has_ended
from layerwise.lab.runs.recorded import Run
from layerwise.lab.training.progress import ProgressKind, make_progress
from layerwise.lab.training.run import check_buildable, train

AUTO_EXTENSIONS = 4  # points beyond a grid of `auto` at most, where the best lies at an end


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns: each contender at its best rate, all losses on the grids, and what to note."""

    contenders: list[Contender]
    curves: list[RateCurve]
    notes: list[str]

    @property
    def tuned(self) -> bool:
        """Whether any contender was given more than one rate."""
        return any(len(curve.rates) > 1 for curve in self.curves)


@dataclass
class Outcome:
    """All runs of one contender: base rate -> a run per seed."""

    entry: Entry
    look: Look
    runs: dict[float, list[Run]] = field(default_factory=dict)

    @property
    def curve(self) -> RateCurve:
        losses = {lr: [run.final_val_loss for run in runs] for lr, runs in self.runs.items()}
        return RateCurve(self.entry.label, self.look, losses)

    @property
    def at_best(self) -> Contender:
        """At the rate of the lowest mean loss, or at the lowest where all diverged."""
        rate = self.curve.best if self.curve.best is not None else self.curve.rates[0]
        return Contender(self.entry.label, self.look, tuple(self.runs[rate]))


class Runner:
    """Trains the runs of a comparison that are missing; `say` is told in a line what was there."""

    def __init__(self, config: CompareConfig, progress: ProgressKind, say: Callable[[str], None]) -> None:
        self.config, self.progress, self.say = config, progress, say
        self.store = RunStore(config.folder)

    def runs(self, entry: Entry, changes: Mapping[str, Any]) -> list[Run]:
        """A run per seed of the contender's optimizer with `changes` (`{"lr": 1e-3}`)."""
        first, seeds = self.config.training.seed, self.config.compare.seeds
        return [self._run(entry, changes, seed) for seed in range(first, first + seeds)]

    def _run(self, entry: Entry, changes: Mapping[str, Any], seed: int) -> Run:
        placed = self.store.place(self.config_of(entry, changes, seed), entry.name)
        title = f"{entry.label}, rate {changes['lr']:.3g}"
        if self.config.compare.seeds > 1:
            title += f", seed {seed}"
        ended = has_ended(placed.run_path)
        run = train(placed, resume=True, progress=make_progress(self.progress, title))
        if ended:
            loss = run.final_val_loss
            known = f", validation loss {loss:.4f}" if math.isfinite(loss) else ""
            self.say(f"{title}: done before, {run.status}{known}")
        return run

    def config_of(self, entry: Entry, changes: Mapping[str, Any], seed: int) -> Config:
        """The run of one seed, without a place."""
        tree = self.config.model_dump(exclude={"compare"})
        tree["optimizer"] = {**entry.optimizer.model_dump(), **changes}
        tree["training"] |= {"seed": seed, "keep": 1}
        return validate(Config, tree)


def compare(
    config: CompareConfig, *, progress: ProgressKind = "auto", say: Callable[[str], None] = lambda _: None
) -> Comparison:
    """Runs what is missing of a comparison, and returns all of it. `say` is told in a line what happens.

    Raises:
        LayerwiseError: before anything is trained, where the config cannot be run.
    """
    listed = entries(config)
    total = sum(len(entry.rates) for entry in listed) * config.compare.seeds
    runs = f"{total} run{'s' if total != 1 else ''}"
    say(f"{runs} of {config.steps} steps, {config.tokens_per_step:,} tokens a step")
    runner = Runner(config, progress, say)
    check_buildable(runner.config_of(entry, {"lr": entry.rates[0]}, config.training.seed) for entry in listed)
    chosen = looks([entry.optimizer.name for entry in listed])
    outcomes = [_tune(runner, Outcome(entry, look)) for entry, look in zip(listed, chosen, strict=True)]
    return conclude(config, outcomes)


def _tune(runner: Runner, outcome: Outcome) -> Outcome:
    """The contender at every rate of its grid, and beyond it where the grid may grow and its best is at an end."""
    entry = outcome.entry
    for rate in entry.rates:
        outcome.runs[rate] = runner.runs(entry, {"lr": rate})
    for _ in range(AUTO_EXTENSIONS if entry.may_extend else 0):
        further = _beyond(outcome.curve)
        if further is None:
            break
        runner.say(f"{entry.label}: the best rate is at the end of the grid; trying {further:g}")
        outcome.runs[further] = runner.runs(entry, {"lr": further})
    return outcome


def _beyond(curve: RateCurve) -> float | None:
    """The next rate outside a grid whose best is at its end; None where the best lies inside."""
    if curve.best is None:
        return curve.rates[0] / 2
    return {None: None, "lowest": curve.rates[0] / 2, "highest": curve.rates[-1] * 2}[curve.edge]


def conclude(config: CompareConfig, outcomes: Sequence[Outcome]) -> Comparison:
    """Each contender at its best, and what has to be said of how it was found."""
    curves = [outcome.curve for outcome in outcomes]
    return Comparison([outcome.at_best for outcome in outcomes], curves, list(notes(config, curves)))
