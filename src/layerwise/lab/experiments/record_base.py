"""Recording the base file of a small model: its rates at the steps where a large one will be matched."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from layerwise.function_space import BaseRates, FunctionSpaceRecorder, record_base
from layerwise.lab.config.schema import Config
from layerwise.lab.runs.directory import RunWriter
from layerwise.lab.training.observers import RecordRates, steps_to_record
from layerwise.lab.training.progress import ProgressKind, make_progress
from layerwise.lab.training.run import complete
from layerwise.lab.training.trainer import Trainer


def record(config: Config, seeds: Sequence[int], progress: ProgressKind = "plain") -> BaseRates:
    """Base rates of the config's model, averaged over `seeds` (of weights, data order and probes).

    Each seed trains only as far as the last step to be measured: one step, unless `function_space.match_step` or
    `match_every` say otherwise. Nothing is evaluated, and nothing left on the disk. Raises LayerwiseError.
    """
    every, steps = steps_to_record(config.function_space, config.training.steps)
    shown = make_progress(progress)

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
            trainer = Trainer(complete(changed), writer, shown, [observer])
            trainer.start(None)
            trainer.take_steps(steps)
        return observer.recorder

    return record_base(run, seeds)
