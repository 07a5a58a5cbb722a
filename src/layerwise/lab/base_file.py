"""Recording the base file of a small model: its rates at the steps where a large one will be matched."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from layerwise.function_space import BaseRates, FunctionSpaceRecorder, record_base
from layerwise.lab.config import Config
from layerwise.lab.measuring import RecordRates, steps_to_record
from layerwise.lab.progress import Progress, ProgressKind, make_progress
from layerwise.lab.runs import RunWriter
from layerwise.lab.train import complete
from layerwise.lab.trainer import Trainer


def record(config: Config, seeds: Sequence[int], progress: ProgressKind | Progress = "auto") -> BaseRates:
    """Base rates of the config's model, averaged over `seeds` (of weights, data order and probes).

    Each seed trains only as far as the last step to be measured: one step, unless `function_space.match_step` or
    `match_every` say otherwise. Raises LayerwiseError.
    """
    every, steps = steps_to_record(config.function_space, config.steps)
    shown = make_progress(progress)

    def run(seed: int) -> FunctionSpaceRecorder:
        changed = config.replace(
            {
                "training.seed": seed,
                "training.tokens": None,
                "training.steps": config.steps,
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
            try:
                trainer.take_steps(steps)
            finally:
                shown.stop()
                trainer.close()
        return observer.recorder

    return record_base(run, seeds)
