"""Recording the base file of a small model: its rates at the steps where a large one will be matched."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.function_space import BaseRates, FunctionSpaceRecorder, record_base
from layerwise.lab.config.schema import Config
from layerwise.lab.training.function_space_observers import RecordRates, steps_to_record
from layerwise.lab.training.progress import ProgressKind, QuietProgress, make_progress
from layerwise.lab.training.run import take_steps


def record(config: Config, seeds: Sequence[int], progress: ProgressKind | QuietProgress = "plain") -> BaseRates:
    """Base rates of the config's model, averaged over `seeds` (of weights, data order and probes).

    Each seed trains only as far as the last step to be measured: one step, unless `function_space.match_step` or
    `match_every` say otherwise. Raises LayerwiseError.
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
        take_steps(changed, steps, [observer], shown)
        return observer.recorder

    return record_base(run, seeds)
