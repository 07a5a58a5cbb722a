"""What can look at, or take part in, a training run without being part of the loop: what every observer has, and those
that record function-space rates or match them to a base (FLeRM); what is said while runs and sweeps go.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.function_space import BaseRates, FLeRM, FunctionSpaceRecorder
from layerwise.function_space.matching.decide import DepthMap
from layerwise.function_space.steps.watched_step import Record
from layerwise.lab.config.schema import Config, FunctionSpaceConfig
from layerwise.lab.models.families import block_pattern
from layerwise.lab.runs.recorded import duration

if TYPE_CHECKING:
    from layerwise.lab.training.trainer import Trainer


class Observer:
    """Hooks of a training run; each does nothing until it is overridden. Each process has its own: they must do the same."""

    def begin(self, trainer: Trainer, saved: dict[str, Any] | None) -> None:
        """Once, after everything is built and a checkpoint, if any, is loaded; `saved`: what its `state_dict` gave then."""

    def around_step(self, step: int) -> AbstractContextManager[Any]:
        """Entered before `optimizer.step()`, left after it. Gradients are final: clipped. `step`, from 1, is being taken."""
        return nullcontext()

    def multiplier(self, parameter: str) -> float:
        """What this observer multiplies the learning rate of a parameter by, beyond its group and layer rate."""
        return 1.0

    def after_step(self, step: int) -> None:
        """After the scheduler moved and gradients were cleared."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, kept in every checkpoint: those of the first process."""
        return {}


def observers_of(config: Config) -> list[Observer]:
    """The observers that a config's `function_space` section asks for: what is recorded is the step as it was matched."""
    settings = config.function_space
    match = None if settings.match is None else MatchRates(settings, config.training.steps)
    found: list[Observer] = []
    if settings.record_every:
        found.append(RecordRates(settings, settings.record_every, match))
    return found if match is None else [*found, match]


def measuring_batches(trainer: Trainer, count: int, skip: int = 0) -> list[Tensor]:
    """Inputs of the steps after the run's last one, which no step of it sees, but for the first `skip`.

    Of each batch, this process's share: all of them measure together.
    """
    first = trainer.config.training.steps + skip
    batches = (trainer.data.batch(first + k).share(trainer.rank, trainer.world) for k in range(count))
    return [batch.to(trainer.device).inputs for batch in batches]


# Far from the seeds that people choose.
_OTHER_PROBES = 1 << 20


class RecordRates(Observer):
    """Writes function_space.jsonl. `recorder` keeps the records too.

    Matched steps are recorded on other batches and with other probes than they were matched on: what is recorded is
    what the matching achieved, not what it aimed at.
    """

    recorder: FunctionSpaceRecorder

    def __init__(self, settings: FunctionSpaceConfig, every: int, match: MatchRates | None = None) -> None:
        self.settings, self.every, self.match = settings, every, match

    def begin(self, trainer: Trainer, saved: dict[str, Any] | None) -> None:
        batches, seed = self.settings.batches, trainer.config.training.seed
        matched = self.match is not None
        self._writer = trainer.writer
        self._batches = partial(measuring_batches, trainer, batches, skip=batches if matched else 0)
        measured = {**self.settings.measured, "seed": seed + _OTHER_PROBES if matched else seed}
        self.recorder = FunctionSpaceRecorder(trainer.model, trainer.optimizer, self.every, sink=self._write, **measured)
        if saved is not None:
            self.recorder.load_state_dict(saved)

    def _write(self, record: Record) -> None:
        row = record.to_dict()
        if self.match is not None:
            row["lrs"] = self.match.flerm.learning_rates()
        row |= {"step": record.step + 1, "scheduled": record.scheduled + 1}  # a recorder counts from 0
        self._writer.append("function_space", row)

    def around_step(self, step: int) -> AbstractContextManager[Any]:
        return self.recorder.step(self._batches)

    def state_dict(self) -> dict[str, Any]:
        return self.recorder.state_dict()


class MatchRates(Observer):
    """Matches learning rates at the configured steps; what was decided goes into run.json as `matching`.

    steps: how many the run will take. Raises LayerwiseError, before anything is written, where one of its matchings
    could not happen.
    """

    flerm: FLeRM

    def __init__(self, settings: FunctionSpaceConfig, steps: int) -> None:
        assert settings.match is not None
        self.settings = settings
        self._matchings: list[dict[str, Any]] = []
        self._base = settings.match if settings.match == "uniform" else BaseRates.load(settings.match)
        due = _matched_steps(settings, steps)
        if isinstance(self._base, BaseRates):
            _check_recorded(self._base, settings, due)
        # FLeRM looks ahead to the second matching, which a short run does not reach.
        self._every = settings.match_every if len(due) > 1 else None

    def begin(self, trainer: Trainer, saved: dict[str, Any] | None) -> None:
        settings = self.settings
        self._writer, self._batches = trainer.writer, partial(measuring_batches, trainer, settings.batches)
        measured = {**settings.measured, "seed": trainer.config.training.seed}
        due: dict[str, Any] = {"at": settings.match_step - 1, "every": self._every}
        self.flerm = FLeRM(trainer.model, trainer.optimizer, self._base, depth_map(trainer.config), **due, **measured)
        if saved is not None:
            self._matchings = list(saved.pop("matchings"))
            self.flerm.load_state_dict(saved)
            self._writer.update(matching=self._matchings)

    def around_step(self, step: int) -> AbstractContextManager[Any]:
        return self.flerm.step(self._batches)

    def multiplier(self, parameter: str) -> float:
        return self.flerm.named.multipliers.get(parameter, 1.0)

    def after_step(self, step: int) -> None:
        if self.flerm.reports:
            report = self.flerm.reports.pop()
            rows = {name: asdict(row) for name, row in report.rows.items()}
            self._matchings.append({"step": report.step + 1, "base": self.settings.match, "rates": rows})
            self._writer.update(matching=self._matchings)

    def state_dict(self) -> dict[str, Any]:
        return {**self.flerm.state_dict(), "matchings": self._matchings}


def depth_map(config: Config) -> DepthMap | None:
    """The configured depth map, or the one that every model of ours has."""
    settings = config.function_space
    if settings.depth is not None or settings.match == "uniform":
        return settings.depth
    return {block_pattern(config.model): "split"}


def _matched_steps(settings: FunctionSpaceConfig, steps: int) -> range:
    """The steps of a run, counted from 0, that are matched. Raises LayerwiseError where there are none."""
    if settings.match_step > steps:
        raise LayerwiseError(
            f"function_space.match_step={settings.match_step} in a run of {steps} steps: its rates would never be"
            f" matched; set {steps} or less, or take more steps (training.steps)"
        )
    return range(settings.match_step - 1, steps, settings.match_every or steps)


def _check_recorded(base: BaseRates, settings: FunctionSpaceConfig, due: range) -> None:
    """Raises LayerwiseError for a step that is to be matched and that the base has no record of."""
    missing = next((step for step in due if step not in base.records), None)
    if missing is None:
        return
    # In the words of the config, where steps count from 1.
    keys = f"function_space.match_step={settings.match_step}"
    if settings.match_every:
        keys += f" function_space.match_every={settings.match_every}"
    recorded = [str(step + 1) for step in sorted(base.records)]
    shown = ", ".join(recorded if len(recorded) < 6 else [*recorded[:3], "...", recorded[-1]])
    raise LayerwiseError(
        f"{keys}: step {missing + 1} is to be matched, and base file {settings.match!r} has only step {shown}; record"
        f" the base with {keys} and training.steps={due[-1] + 1} or more"
    )


def steps_needed(settings: FunctionSpaceConfig, steps: int) -> tuple[int, int]:
    """How often a base has to be measured for its rates to be matched later, and in how many steps.

    Raises LayerwiseError where the first matching is after the run's last step.
    """
    at = _matched_steps(settings, steps).start
    if settings.match_every:
        return math.gcd(at, settings.match_every), steps
    return max(1, at), at + 1


def quiet_matching() -> None:
    """What FLeRM leaves alone is in run.json; a sweep does not repeat it for every trial."""
    warnings.filterwarnings("ignore", message="FLeRM left")


class QuietProgress:
    """Told how far something is, `done` of `total` steps (or trials), and what to say beside that; shows nothing."""

    def start(self, title: str, total: int, done: int) -> None: ...
    def numbers(self, done: int, text: str) -> None: ...
    def note(self, text: str) -> None: ...


class PlainProgress(QuietProgress):
    """About ten lines on standard error, each with the time left.

    Args:
        title: shown instead of the one that `start` is given.
        unit: what is counted.
    """

    def __init__(self, title: str = "", unit: str = "step") -> None:
        self.title, self.unit = title, unit

    def start(self, title: str, total: int, done: int) -> None:
        self.title = self.title or title
        self._total, self._first, self._next, self._started = total, done, 0, time.monotonic()

    def numbers(self, done: int, text: str) -> None:
        if done < self._next and done != self._total:
            return
        self._next = done + math.ceil(self._total / 10)
        left = (time.monotonic() - self._started) / max(1, done - self._first) * (self._total - done)
        more = f", {duration(left)} left" if left >= 1 else ""
        self.note(f"{self.unit} {done}/{self._total}  {text}{more}")

    def note(self, text: str) -> None:
        print(f"{self.title}: {text}" if self.title else text, file=sys.stderr, flush=True)
