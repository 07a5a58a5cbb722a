"""Recording the base file of a small model: its rates at the steps where a large one will be matched."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from layerwise.errors import LayerwiseError
from layerwise.function_space import BaseRates, FunctionSpaceRecorder, record_base
from layerwise.lab.config.schema import Config
from layerwise.lab.training.function_space_observers import RecordRates, steps_to_record
from layerwise.lab.training.progress import Progress, ProgressKind, make_progress
from layerwise.lab.training.run import take_steps


def check_output(path: Path) -> None:
    """Makes the folder that a base file is to be in. Raises LayerwiseError where the file could not be written.

    For before the training, which would be lost.
    """
    if path.is_dir():
        raise LayerwiseError(
            f"-o {str(path)!r} is a folder: name a file, such as {str(path / 'base.json')!r}"
        )
    if path.exists() and not path.is_file():
        raise LayerwiseError(f"-o {str(path)!r} is not a plain file: name a file, such as base.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LayerwiseError(
            f"-o {str(path)!r} cannot be written ({error.strerror}): name a file in a folder that can be written to"
        ) from None


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
        take_steps(changed, steps, [observer], shown)
        return observer.recorder

    return record_base(run, seeds)
