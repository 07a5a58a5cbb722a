"""The processes that train one run together, as torchrun and `accelerate launch` start them; without those, just one."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from torch import Tensor

from layerwise.errors import LayerwiseError

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


def own_seed(seed: int, step: int = 0) -> int:
    """Seed of this process's dropout from `step` on: the run's own for the first process at its start."""
    if rank() == 0 and step == 0:
        return seed
    return int(np.random.SeedSequence([seed, rank(), step]).generate_state(1)[0])
