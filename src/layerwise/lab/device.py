"""Accelerate, set up for a run: device, mixed precision, accumulation."""

from __future__ import annotations

import random
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from layerwise.errors import LayerwiseError

if TYPE_CHECKING:
    from layerwise.lab.config import TrainingConfig


def make_accelerator(training: TrainingConfig) -> Accelerator:
    """An Accelerator for one run. Raises LayerwiseError for a precision this device has not."""
    # Accelerate keeps its settings in globals; one process can train several runs of different precision.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=training.precision, gradient_accumulation_steps=training.accumulation
        )
    except (ValueError, RuntimeError) as error:
        raise LayerwiseError(f"training.precision={training.precision}: {error}") from None
    if training.precision == "fp16" and accelerator.device.type != "cuda":
        raise LayerwiseError(
            f"training.precision=fp16 needs a GPU, this device is {accelerator.device.type}: use bf16 or no"
        )
    if training.precision == "fp16":
        # The first steps usually overflow and are left out; the schedule counts them all the same.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    if accelerator.num_processes > 1:
        raise LayerwiseError(
            f"{accelerator.num_processes} processes: this version trains in one process; start it without a launcher"
        )
    return accelerator


def set_seed(seed: int) -> None:
    """Seeds every global generator: Python's, NumPy's and torch's on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
