"""Training as a function: a config in, a run out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import Config
from layerwise.lab.models.families import model_settings
from layerwise.lab.optimizers.default_rates import default_rate
from layerwise.lab.optimizers.registry import find_preset, with_defaults
from layerwise.lab.runs.checkpoint import read_state
from layerwise.lab.runs.directory import RUN_FILE, RunWriter, SilentWriter, read_run
from layerwise.lab.runs.recorded import Run
from layerwise.lab.training import processes
from layerwise.lab.training.function_space_observers import observers_of
from layerwise.lab.training.observers import Observer
from layerwise.lab.training.progress import Progress, ProgressKind, make_progress
from layerwise.lab.training.resume import check_same_run, latest_checkpoint
from layerwise.lab.training.trainer import Trainer


def complete(config: Config) -> Config:
    """The config with everything filled in that would otherwise depend on this version's defaults, and checked."""
    model_settings(config.model)
    find_preset(config.optimizer)
    rate = default_rate(config.model, config.optimizer.name)
    training = config.training.model_copy(update={"steps": config.steps, "tokens": None})
    run = config.run.model_copy(update={"name": config.run_name})
    match = config.function_space.match
    if match not in (None, "uniform") and config.optimizer.lr is None:
        raise LayerwiseError(
            f"function_space.match={match} without optimizer.lr: give the rate that the base was recorded with"
            " (a preset's own is tuned for its own size)"
        )
    warmup = config.schedule.warmup(config.steps)
    if warmup >= config.steps:
        raise LayerwiseError(
            f"schedule.warmup_steps={warmup} in a run of {config.steps} steps: the base rate is never reached;"
            " set fewer, or null for a tenth of the run"
        )
    return config.model_copy(
        update={
            "optimizer": with_defaults(config.optimizer, rate),
            "schedule": config.schedule.model_copy(update={"warmup_steps": warmup}),
            "training": training,
            "run": run,
        }
    )


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressKind | Progress = "auto",
    observers: Sequence[Observer] = (),
) -> Run:
    """Trains what `config` says and returns the run, read back from its directory.

    `resume` goes on from the newest good checkpoint of `config.run_path` (from the start where there is none), bit for
    bit as if the run had never been interrupted; a run that has ended is returned as it is. `overwrite` starts anew
    over an older run. A run whose loss stops being finite ends with status "diverged".

    Under torchrun or `accelerate launch` every process calls this with the same arguments, on a file system they all
    see: they train one run together, which the first of them writes and shows. They can be others when it is resumed.

    Raises LayerwiseError for a config that cannot be run and for a directory that holds another run.
    """
    config = complete(config)
    path = config.run_path
    processes.join(config.parallel.timeout)
    if processes.first_says(processes.on_first(lambda: _has_ended(config, resume, overwrite))):
        return read_run(path)
    shown = make_progress(progress if processes.rank() == 0 else "quiet")
    with processes.on_first(lambda: RunWriter(path)) or SilentWriter(path) as writer:
        trainer = Trainer(config, writer, shown, [*observers_of(config), *observers])
        trainer.start(_state_to_resume(trainer) if resume else None)
        try:
            trainer.run()
        finally:
            shown.stop()
            trainer.close()
    processes.wait_for_all()  # until it is written
    return read_run(path)


def _has_ended(config: Config, resume: bool, overwrite: bool) -> bool:
    """Whether there is nothing left to do. Raises LayerwiseError where there is something else in the run's place."""
    path = config.run_path
    if overwrite or not (path / RUN_FILE).exists():
        return False
    found = read_run(path)
    if not resume:
        raise LayerwiseError(
            f"run {path} exists ({found.status}): --resume continues it, --overwrite replaces it,"
            " run.name=NAME starts another"
        )
    check_same_run(found.config, config.model_dump(), f"run {path}")
    return found.status != "running"


def _state_to_resume(trainer: Trainer) -> dict[str, Any] | None:
    """The state in the newest good checkpoint, on every process; the first one chooses it."""
    path, identity, note = trainer.writer.path, trainer.identity, trainer.progress.note
    found = processes.first_says(processes.on_first(lambda: latest_checkpoint(path, identity, note)))
    return None if found is None else read_state(found)


def take_steps(
    config: Config, steps: int, observers: Sequence[Observer], progress: ProgressKind | Progress = "quiet"
) -> None:
    """The first steps of a run, for what observers see of them: nothing is evaluated, and nothing left on the disk."""
    shown = make_progress(progress)
    with tempfile.TemporaryDirectory() as folder, RunWriter(folder) as writer:
        trainer = Trainer(complete(config), writer, shown, observers)
        trainer.start(None)
        try:
            trainer.take_steps(steps)
        finally:
            shown.stop()
            trainer.close()
