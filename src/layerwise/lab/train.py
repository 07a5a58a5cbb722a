"""Training as a function: a config in, a run out."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.errors import LayerwiseError
from layerwise.lab.base_rates import default_rate
from layerwise.lab.config import Config
from layerwise.lab.measuring import observers_of
from layerwise.lab.models import model_settings
from layerwise.lab.observers import Observer
from layerwise.lab.optimizers import find_preset, with_defaults
from layerwise.lab.progress import Progress, ProgressKind, make_progress
from layerwise.lab.resume import check_same_run, latest_state
from layerwise.lab.runs import RUN_FILE, Run, RunWriter, read_run
from layerwise.lab.trainer import Trainer


def complete(config: Config) -> Config:
    """The config with everything filled in that would otherwise depend on this version's defaults, and checked."""
    model_settings(config.model)
    find_preset(config.optimizer)
    rate = default_rate(config.model, config.optimizer.name)
    training = config.training.model_copy(update={"steps": config.steps, "tokens": None})
    run = config.run.model_copy(update={"name": config.run_name})
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

    Raises LayerwiseError for a config that cannot be run and for a directory that holds another run.
    """
    config = complete(config)
    path = config.run_path
    if (path / RUN_FILE).exists() and not overwrite:
        found = read_run(path)
        if not resume:
            raise LayerwiseError(
                f"run {path} exists ({found.status}): --resume continues it, --overwrite replaces it,"
                " run.name=NAME starts another"
            )
        check_same_run(found.config, config.model_dump(), f"run {path}")
        if found.status != "running":
            return found
    shown = make_progress(progress)
    with RunWriter(path) as writer:
        trainer = Trainer(config, writer, shown, [*observers_of(config), *observers])
        state = latest_state(path, trainer.identity, shown.note) if resume else None
        trainer.start(state)
        try:
            trainer.run()
        finally:
            shown.stop()
            trainer.close()
    return read_run(path)
