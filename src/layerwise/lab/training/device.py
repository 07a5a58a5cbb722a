"""What a run computes on and in: its device, its mixed precision, its random numbers."""

from __future__ import annotations

import os
import random
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import TrainingConfig

_TRUE = ("1", "true", "yes", "y", "on", "t")


def own_device() -> torch.device:
    """This process's device: its GPU by local rank, or the host where there is none or accelerate's launcher says so."""
    if _says("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _says(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _TRUE


def check_precision(training: TrainingConfig, device: torch.device) -> None:
    """Raises LayerwiseError for a precision that this device has not, and for a launcher that would change the model."""
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if _says(f"ACCELERATE_USE_{kind}"):
            raise LayerwiseError(
                f"accelerate's configuration asks for {kind}: choose parallel.strategy in the run's config, and"
                " launch with --multi_gpu"
            )
    if training.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise LayerwiseError("training.precision=bf16: this GPU has no bfloat16: use no")


def autocast(model: nn.Module, precision: str, device: torch.device) -> None:
    """Has `model` compute in the precision where torch's autocast does, whoever calls it; its outputs are float32."""
    if precision == "no":
        return
    context = torch.autocast(device.type, torch.bfloat16)
    inner = model.forward.__func__  # type: ignore[attr-defined]  # a method

    def forward(self: nn.Module, *args: Any, **keywords: Any) -> Any:
        with context:
            outputs = inner(self, *args, **keywords)
        return tree_map_only(torch.Tensor, lambda x: x.float() if x.dtype == torch.bfloat16 else x, outputs)

    model.forward = MethodType(forward, model)


def set_seed(seed: int) -> None:
    """Seeds every global generator: Python's, NumPy's and torch's on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
