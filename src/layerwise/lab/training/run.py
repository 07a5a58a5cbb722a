"""Training as a function: a config in, a run out, or a small model's base rates."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.function_space import BaseRates, FunctionSpaceRecorder, record_base
from layerwise.lab.config.identity import differences, hashed, identity
from layerwise.lab.config.schema import Config
from layerwise.lab.data.batches import open_data
from layerwise.lab.models.families import build_model, model_settings
from layerwise.lab.models.family import Examples
from layerwise.lab.optimizers.registry import build_optimizer, check_batch, default_rate, find_preset, with_defaults
from layerwise.lab.runs import checkpoint, directory
from layerwise.lab.runs.checkpoint import DamagedCheckpointError, list_checkpoints
from layerwise.lab.runs.directory import RUN_FILE, RunWriter, read_run
from layerwise.lab.runs.recorded import Run, read_lines
from layerwise.lab.training import processes
from layerwise.lab.training.observers import Observer, PlainProgress, QuietProgress, RecordRates, observers_of, steps_needed
from layerwise.lab.training.trainer import Trainer


def complete(config: Config) -> Config:
    """The config with everything filled in that would otherwise depend on this version's defaults, and checked."""
    model_settings(config.model)
    find_preset(config.optimizer)
    rate = default_rate(config.model, config.optimizer.name)
    match = config.function_space.match
    if match not in (None, "uniform") and config.optimizer.lr is None:
        raise LayerwiseError(
            f"function_space.match={match} without optimizer.lr: give the rate that the base was recorded with"
            " (a preset's own is tuned for its own size)"
        )
    warmup = config.schedule.warmup(config.training.steps)
    if warmup >= config.training.steps:
        raise LayerwiseError(
            f"schedule.warmup_steps={warmup} in a run of {config.training.steps} steps: the base rate is never reached;"
            " set fewer, or null for a tenth of the run"
        )
    return config.model_copy(
        update={
            "optimizer": with_defaults(config.optimizer, rate),
            "schedule": config.schedule.model_copy(update={"warmup_steps": warmup}),
            "run": config.run.model_copy(update={"name": config.run_name}),
        }
    )


def check_buildable(configs: Iterable[Config]) -> None:
    """Builds everything that the runs are made of, and trains nothing: what can be known before training, is.

    Raises:
        LayerwiseError: naming what one of them lacks.
    """
    known: dict[str, Examples] = {}
    for config in map(complete, configs):
        key = hashed([config.data.model_dump(), config.training.model_dump()])
        if key not in known:
            data = open_data(config)
            known[key] = Examples(data.vocab_size, config.data.seq_len, data.features)
        optimizer = build_optimizer(build_model(config.model, known[key], 0), config.optimizer)
        check_batch(config.training, optimizer, processes.world())
        processes.check_precision(config.training, processes.own_device())
        observers_of(config)


def train(
    config: Config,
    *,
    resume: bool = False,
    or_start: bool = False,
    overwrite: bool = False,
    progress: QuietProgress | None = None,
    observers: Sequence[Observer] = (),
) -> Run:
    """Trains what `config` says and returns the run, read back from its directory.

    `resume` goes on from the newest good checkpoint of `config.run_path`, bit for bit as if the run had never been
    interrupted. A run that has ended is returned as it is. Where there is no checkpoint yet it is an error, or with
    `or_start` a start at step 0, which is said. `overwrite` starts anew over an older run. A run whose loss stops being
    finite ends with status "diverged"; one that was stopped stays "running", and run.json says under `stopped` at which
    step and why.

    Under torchrun or `accelerate launch` every process calls this with the same arguments, on a file system they all
    see: they train one run together, which the first of them writes and shows. They can be others when it is resumed.

    Raises LayerwiseError for a config that cannot be run and for a directory that holds another run.
    """
    config = complete(config)
    path = config.run_path
    if resume and overwrite:
        raise LayerwiseError("--resume and --overwrite: one goes on with a run, the other deletes it; give one")
    if or_start and not resume:
        raise LayerwiseError("--or-start goes with --resume: a run starts at step 0 without either")
    processes.join(config.parallel.timeout)
    if processes.first_says(processes.on_first(lambda: _has_ended(config, resume, overwrite))):
        return read_run(path)
    if resume:
        processes.on_first(lambda: check_resumable(path, config.training.checkpoint_every, or_start))
    shown = QuietProgress() if processes.rank() > 0 else progress or PlainProgress()
    with processes.on_first(lambda: RunWriter(path)) or directory.SilentWriter(path) as writer:
        trainer = Trainer(config, writer, shown, [*observers_of(config), *observers])
        found = processes.first_says(processes.on_first(lambda: latest_checkpoint(trainer))) if resume else None
        trainer.start(None if found is None else checkpoint.read_state(found))
        trainer.run()
    processes.wait_for_all()  # until it is written
    return read_run(path)


def record(config: Config, seeds: Sequence[int]) -> BaseRates:
    """Base rates of the config's model, averaged over `seeds` (of weights, data order and probes).

    Each seed trains only as far as the last step to be measured: one step, unless `function_space.match_step` or
    `match_every` say otherwise. Nothing is evaluated or shown, and nothing left on the disk. Raises LayerwiseError.
    """
    every, steps = steps_needed(config.function_space, config.training.steps)

    def run(seed: int) -> FunctionSpaceRecorder:
        changed = config.replace(
            {
                "training.seed": seed,
                "training.eval_every": 0,
                "run.name": f"base-{seed}",
                "run.tensorboard": False,
                "function_space.match": None,
            }
        )
        observer = RecordRates(config.function_space, every)
        with tempfile.TemporaryDirectory() as folder, RunWriter(folder) as writer:
            trainer = Trainer(complete(changed), writer, QuietProgress(), [observer])
            trainer.start(None)
            trainer.take_steps(steps)
        return observer.recorder

    return record_base(run, seeds)


def _has_ended(config: Config, resume: bool, overwrite: bool) -> bool:
    """Whether there is nothing left to do. Raises LayerwiseError where there is something else in the run's place."""
    path = config.run_path
    if overwrite:
        return False
    if not (path / RUN_FILE).exists():
        if (found_there := directory.in_the_way(path)) and not (resume and list_checkpoints(path / "checkpoints")):
            deleted = ", ".join(directory.cleared_away(path)) or "nothing"
            raise LayerwiseError(
                f"run.name: {path} holds {', '.join(found_there[:5])} and no {RUN_FILE}, so it is no run of ours:"
                f" set another run.name, or --overwrite, which deletes {deleted} there"
            )
        return False
    found = read_run(path)
    if not resume:
        raise LayerwiseError(
            f"run {path} exists ({found.status}): --resume continues it, --overwrite replaces it,"
            " run.name=NAME starts another"
        )
    check_same_run(found.config, config.model_dump(), f"run {path}")
    return found.status != "running"


def check_same_run(saved: Mapping[str, Any], config: Mapping[str, Any], what: str) -> None:
    """Raises LayerwiseError naming the keys in which the config differs from that of `what`. The text is not compared."""
    differing = differences(identity(saved, ""), identity(config, ""))
    if differing:
        raise LayerwiseError(
            f"{what} is of another config ({'; '.join(differing[:4])}): resume with the one it has, or set run.name"
        )


def check_resumable(path: Path, checkpoint_every: int, or_start: bool) -> None:
    """Raises LayerwiseError where a run has no checkpoint: it starts at step 0 where that is asked for and loses nothing."""
    if list_checkpoints(path / "checkpoints"):
        return
    steps = [row.get("step") for row in read_lines(path / "metrics.jsonl")]
    reached = max((step for step in steps if isinstance(step, int)), default=0)
    if checkpoint_every and reached >= checkpoint_every:
        raise LayerwiseError(
            f"run {path} came to step {reached} and has no checkpoint (training.checkpoint_every={checkpoint_every}):"
            " they were deleted, or could not be written; --overwrite starts at step 0 and deletes"
            f" {', '.join(directory.cleared_away(path))}"
        )
    if not or_start:
        there = f"came to step {reached} and has no checkpoint yet" if path.exists() else "does not exist"
        raise LayerwiseError(
            f"--resume: run {path} {there}, so there is nothing to go on from; --resume --or-start starts it at step 0"
        )


def latest_checkpoint(trainer: Trainer) -> Path | None:
    """The newest good checkpoint of a run, or None where it has none yet.

    A damaged checkpoint is reported and passed over for the one before it. Raises LayerwiseError where every checkpoint is
    damaged, or where they are of another run.
    """
    damage: list[DamagedCheckpointError] = []
    for path in list_checkpoints(trainer.writer.path / "checkpoints"):
        try:
            saved = checkpoint.read_manifest(path).get("identity")
            if not (isinstance(saved, dict) and isinstance(saved.get("config"), dict) and "corpus" in saved):
                raise DamagedCheckpointError(f"checkpoint {path}: it does not say what it belongs to")
            check_same_run(saved["config"], trainer.identity["config"], f"checkpoint {path}")
            if saved["corpus"] != trainer.identity["corpus"]:
                raise LayerwiseError(f"checkpoint {path} was trained on another text: its hash is another")
            checkpoint.check_hash(path)
        except DamagedCheckpointError as error:
            damage.append(error)
            continue
        for skipped in damage:
            trainer.progress.note(f"{skipped}; going on from {path.name}")
        return path
    if damage:
        raise LayerwiseError(f"{damage[0]}; no older one is good: --overwrite starts anew")
    trainer.progress.note(f"{trainer.writer.path} has no checkpoint: starting at step 0")
    return None
