"""The processes that train one run together, as torchrun and `accelerate launch` start them; without those, just one.

And what this one computes on and in: its device, its mixed precision, its random numbers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from datetime import timedelta
from types import MethodType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import TrainingConfig

T = TypeVar("T")


def world() -> int:
    """How many processes there are, before they have joined each other too."""
    return dist.get_world_size() if dist.is_initialized() else _launched("WORLD_SIZE", 1)


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else _launched("RANK", 0)


def _launched(variable: str, alone: int) -> int:
    """What a launcher says in the environment. It always gives both: some clusters set one of them for other ends."""
    both = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    return int(os.environ[variable]) if both else alone


def join(timeout: float) -> None:
    """Joins the others: gloo for tensors on the host, NCCL for those on GPUs. Waiting for them ends after `timeout` s."""
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group(timeout=timedelta(seconds=timeout))


def leave() -> None:
    """Parts from the others, once all is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def refuse_several(what: str) -> None:
    """Raises LayerwiseError under a launcher of several processes."""
    if world() > 1:
        raise LayerwiseError(
            f"{what} runs in one process, the launcher started {world()}: start it without a launcher;"
            " only `layerwise train` trains on several"
        )


def on_first(do: Callable[[], T]) -> T | None:
    """What `do` returns, on the first process; None on the others, when it is done. Its LayerwiseError is raised on all."""
    made, failed = None, None
    if rank() == 0:
        try:
            made = do()
        except LayerwiseError as error:
            failed = error
    failed = first_says(failed)
    if failed is not None:
        raise failed
    return made


def first_says(value: T) -> T:
    """The first process's plain `value`, on all of them."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all(value: T) -> list[T]:
    """Every process's plain `value`, in their order, on all of them."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, on all of them."""
    if world() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if world() > 1:
        dist.barrier()


def set_seed(seed: int, step: int = 0) -> None:
    """Seeds every global generator (Python's, NumPy's, torch's on all devices) for this process's dropout from `step` on:
    with the run's own seed on the first process at its start.
    """
    if rank() > 0 or step > 0:
        seed = int(np.random.SeedSequence([seed, rank(), step]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "y", "on", "t")


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
