"""A model and its state over several processes: copies (DDP) or shards (FSDP2), and whole again in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from layerwise.common.tensors import placed_as
from layerwise.lab.config.schema import ParallelConfig
from layerwise.lab.training import processes


def strategy_of(config: ParallelConfig) -> str:
    """What is done with the model: `single`, `ddp` or `fsdp2`."""
    return config.strategy if processes.world() > 1 else "single"


def place(model: nn.Module, device: torch.device, config: ParallelConfig) -> nn.Module:
    """The model on this process's device: whole, or its shard of every parameter. Before an optimizer is made for it."""
    if strategy_of(config) != "fsdp2":
        return model.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.world(),))
    for block in _blocks(model):  # one after the other, so that no more than one is whole on the device
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules: a transformer's blocks."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def wrap(model: nn.Module, device: torch.device, config: ParallelConfig) -> nn.Module:
    """What the loop calls instead of the model."""
    if strategy_of(config) != "ddp":
        return model
    devices = [device] if device.type == "cuda" else None
    # No model here has buffers that training changes. Before torch 2.13 the option had another name.
    known = signature(DistributedDataParallel).parameters
    unsynced: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True, **unsynced)


def gradients_shared(wrapped: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """Around forward and backward passes: where not `wanted`, DDP leaves averaging to a later micro-batch.

    FSDP2 always averages: leaving it would keep the gradient of the whole model on every process.
    """
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not wanted else nullcontext()


def clip(model: nn.Module, largest: float) -> Tensor:
    """Scales gradients down to a global l2 norm of at most `largest`; the norm they had, the same on all processes."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    clip_grads_with_norm_(parameters, largest, norm)
    return norm


def whole(tree: Any) -> Any:
    """A state with every sharded tensor whole, on the first process's host, and gone on the others. All must call it."""

    def gathered(shard: DTensor) -> Tensor | None:
        full = shard.full_tensor()
        return full.cpu() if processes.rank() == 0 else None

    return tree_map_only(DTensor, gathered, tree)


def load_model(model: nn.Module, state: dict[str, Any]) -> None:
    """Loads a whole state into a model that may be sharded. Raises what `load_state_dict` raises."""
    own = model.state_dict()
    model.load_state_dict({name: _like(value, own.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads a whole state into the optimizer of a model that may be sharded. Raises what `load_state_dict` raises."""
    params = [param for group in optimizer.param_groups for param in group["params"]]

    def placed(index: int, entries: dict[str, Any]) -> dict[str, Any]:
        param = params[index]
        own = optimizer.state.get(param, {})  # torch's optimizers have none before their first step
        return {key: _like(value, own.get(key, param)) for key, value in entries.items()}

    known = {i: placed(i, entries) for i, entries in state["state"].items() if i < len(params)}
    optimizer.load_state_dict({**state, "state": {**state["state"], **known}})


def _like(value: Any, holder: Any) -> Any:
    """A whole tensor sharded as `holder` is; anything else as it is."""
    fits = isinstance(holder, DTensor) and isinstance(value, Tensor) and value.shape == holder.shape
    return placed_as(value, holder) if fits else value
