"""Accelerate, set up for a run: device and mixed precision."""

from __future__ import annotations

import random
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

from layerwise.errors import LayerwiseError
from layerwise.lab.training.parallel import strategy_of

if TYPE_CHECKING:
    from layerwise.lab.config.schema import ParallelConfig, TrainingConfig

# What a launcher's own configuration may ask for: one device for each process, and nothing done to the model.
_PLAIN = {DistributedType.NO, *(kind for kind in DistributedType if kind.value.startswith("MULTI_"))}


def make_accelerator(training: TrainingConfig, parallel: ParallelConfig) -> Accelerator:
    """An Accelerator for one run, joined processes and all. Raises LayerwiseError for a precision this device has not.

    Sharing the model out over processes is our own (`parallel`): the loop needs no more of it than a few calls.
    """
    # Accelerate keeps its settings in globals; one process can train several runs of different precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        accelerator = Accelerator(mixed_precision=training.precision)
    except (ValueError, RuntimeError) as error:
        raise LayerwiseError(f"training.precision={training.precision}: {error}") from None
    if training.precision == "fp16" and accelerator.device.type != "cuda":
        raise LayerwiseError(
            f"training.precision=fp16 needs a GPU, this device is {accelerator.device.type}: use bf16 or no"
        )
    if training.precision == "fp16":
        # The first steps usually overflow and are left out; the schedule counts them all the same.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    if training.precision == "fp16" and strategy_of(parallel) == "fsdp2":
        raise LayerwiseError(
            "training.precision=fp16: its loss scaling does not work with parallel.strategy=fsdp2: use bf16 or no"
        )
    if accelerator.distributed_type not in _PLAIN:
        raise LayerwiseError(
            f"accelerate's configuration asks for {accelerator.distributed_type.value}: choose parallel.strategy"
            " in the run's config, and launch with --multi_gpu"
        )
    return accelerator


def set_seed(seed: int) -> None:
    """Seeds every global generator: Python's, NumPy's and torch's on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
