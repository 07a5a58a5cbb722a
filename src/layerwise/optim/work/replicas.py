"""Replicas' own gradients, for ``NoiseAdaptive(reference="replicas")``.

Data-parallel processes take the gradients of independent minibatches and average them. Of each parameter one process
keeps its own gradient from before the average, as a hook on the parameter shows it: the memory of one gradient spread
over all processes. At the step it subtracts the mean and takes the norm. The next step another process does, in turn:
replicas whose data are noisier than others' would otherwise slow the layers that fell to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from layerwise.common.group_by import group_by
from layerwise.common.tensors import local_part
from layerwise.errors import LayerwiseError
from layerwise.optim.work.distributed import DistributedWork
from layerwise.optim.work.job import Deviation, Group
from layerwise.optim.work.local import MatrixWork
from layerwise.optim.work.placement import Domain, assign, place

#: A hook of torch's DDP: (state, bucket) -> future of the averaged bucket.
CommHook = Callable[[Any, Any], Any]
_INSTEAD = "use reference='independent' (two halves of an accumulated batch) or 'previous' instead"


class Replicas:
    """Keeps what this process owes to ``reference="replicas"`` between the backward passes and the step.

    Args:
        optimizer: whose parameters they are.
        between: whether the noise of a group is measured between replicas.
    """

    def __init__(self, optimizer: Any, between: Callable[[Group], bool]) -> None:
        self._optimizer, self._between = optimizer, between
        self._turn: int | None = None  # how many steps have been tried; None before it was asked, and after a checkpoint
        self._group: dist.ProcessGroup | None = None
        self._models: set[nn.Module] = set()
        self._watched: set[Tensor] = set()
        self._owners: dict[Tensor, tuple[int, Domain]] | None = None  # of this batch; None before its first gradient
        self._kept: dict[Tensor, Tensor] = {}
        self._averaged: dict[Tensor, Tensor] = {}  # 2-norms right after the average

    # ---------------------------------------------------------------------------------------------------- watching

    def watch(self, model: nn.Module, comm_hook: CommHook | None, state: Any) -> None:
        """See ``LayerwiseOptimizer.watch_replicas``."""
        if model in self._models:
            return
        if isinstance(model, DistributedDataParallel):
            self._watch_ddp(model, comm_hook, state)
        elif any(isinstance(module, FSDPModule) for module in model.modules()):
            if comm_hook is not None:
                raise LayerwiseError("watch_replicas: comm_hook is for DistributedDataParallel, not for fully_shard")
            self._watch_fsdp(model)
        else:
            raise LayerwiseError(
                f"watch_replicas({type(model).__name__}): the replicas' gradients can be seen in a "
                f"DistributedDataParallel model and under fully_shard; for any other {_INSTEAD}"
            )
        self._models.add(model)

    def _watch_ddp(self, model: DistributedDataParallel, comm_hook: CommHook | None, state: Any) -> None:
        if dist.get_world_size(model.process_group) < 2:
            raise LayerwiseError(f"watch_replicas: the model has one replica, and two are compared; {_INSTEAD}")
        if comm_hook is None:
            comm_hook, state = allreduce_hook, model.process_group

        # No annotations: torch compares them, and here they are text.
        def averaged(given, bucket):  # type: ignore[no-untyped-def]
            return comm_hook(state, bucket).then(partial(self._after_average, bucket))

        try:
            model.register_comm_hook(None, averaged)
        except RuntimeError as error:
            raise LayerwiseError(
                "watch_replicas: this DistributedDataParallel has a communication hook already, and there can be one: "
                f"give it here instead, watch_replicas(model, comm_hook, state) ({error})"
            ) from error
        self._group = model.process_group
        for param in model.parameters():
            if param.requires_grad:
                param.register_hook(partial(self._add, param))
                self._watched.add(param)

    def _after_average(self, bucket: Any, future: Any) -> Tensor:
        value = future.value()
        flat: Tensor = value[0] if isinstance(value, list | tuple) else value
        start = 0
        for param in bucket.parameters():
            if param in self._kept:
                self._averaged[param] = _length(flat[start : start + param.numel()])
            start += param.numel()
        return flat

    def _watch_fsdp(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # After fully_shard's own hook, which puts whole parameters in the place of the sharded ones.
                module.register_forward_pre_hook(partial(self._hook_whole, list(_places(module))))
        for param in model.parameters():
            if isinstance(param, DTensor) and param.requires_grad:
                param.register_post_accumulate_grad_hook(self._after_shard)  # type: ignore[no-untyped-call]

    def _hook_whole(self, places: Sequence[tuple[nn.Module, str, Tensor]], *_: Any) -> None:
        for module, name, sharded in places:
            whole = getattr(module, name)
            if whole is not sharded and whole.requires_grad and sharded not in self._watched:
                whole.register_hook(partial(self._add_whole, sharded))
                self._watched.add(sharded)

    def _add_whole(self, sharded: Tensor, grad: Tensor) -> None:
        # Where somebody has silenced the hooks of the parameter, ours on its whole form has to be silent too: function-space
        # probes go backward through the model, and are no gradients.
        if sharded._post_accumulate_grad_hooks:
            self._add(sharded, grad)

    def _after_shard(self, param: Tensor) -> None:
        if self._owners is not None and param in self._owners:
            assert param.grad is not None
            self._averaged[param] = _length(local_part(param.grad))

    # -------------------------------------------------------------------------------------------- during backward

    @torch.no_grad()
    def _add(self, param: Tensor, grad: Tensor) -> None:
        """Add this process's own gradient of one backward pass, if it is the one to keep it."""
        if self._owners is None:
            self._owners = self._plan()
        owner, domain = self._owners.get(param, (None, None))
        if domain is None or owner != domain.me:
            return
        kept = self._kept.get(param)
        if kept is None or (param in self._averaged and param.grad is None):  # cleared behind our back
            self._kept[param] = grad.detach().clone()
        else:
            # What a GradScaler skipped, and somebody cleared in place, must not stay.
            kept.masked_fill_(~_length(kept).isfinite(), 0.0).add_(grad)

    def _plan(self) -> dict[Tensor, tuple[int, Domain]]:
        """Who keeps which parameter's gradient at this step: as many bytes each."""
        groups, states = self._optimizer.param_groups, self._optimizer.state
        wanted = [param for group in groups if self._between(group) for param in group["params"]]
        if self._turn is None:  # reading it waits for the device
            seen = [int(states[param]["gradients_seen"].max()) for param in wanted if param.numel()]
            self._turn = self._optimizer.skipped_steps + max(seen, default=0)
        by_domain = group_by(wanted, lambda param: place(param, self._group).domain)
        return {
            param: ((first + self._turn) % domain.size, domain)
            for domain, params in by_domain.items()
            for param, first in zip(params, assign(tuple(p.numel() for p in params), domain.size), strict=True)
        }

    # ------------------------------------------------------------------------------------------------ at the step

    def deviations(self, params: Sequence[tuple[str, Tensor]], work: MatrixWork) -> list[Deviation]:
        """Of each parameter, given with its name."""
        self._check_group(work)
        owners = self._owners or {}
        for name, param in params:
            if param not in self._watched or param not in owners:
                raise LayerwiseError(
                    f"noise reference 'replicas': no process's own gradient of {name!r} was seen since the last step. "
                    "Call watch_replicas(model) with the model that runs forward and backward and holds this parameter, "
                    f"before its first backward(), or {_INSTEAD}"
                )
            domain, mesh = owners[param][1], getattr(param, "device_mesh", None)
            if domain.size < 2 or (mesh is not None and mesh.size() != domain.size):
                raise LayerwiseError(
                    f"noise reference 'replicas': {name!r} is on {mesh}, of which every process has to be a replica, and "
                    f"on two at least; {_INSTEAD}"
                )
        scale = self._scale()
        return [
            Deviation(owner, domain.size, self._kept.get(param), scale)
            for owner, domain, param in ((*owners[param], param) for _, param in params)
        ]

    def _check_group(self, work: MatrixWork) -> None:
        if not isinstance(work, DistributedWork):
            raise LayerwiseError(
                f"noise reference 'replicas' with {type(work).__name__}: the norms of one replica's gradients have to be "
                f"shared; set optimizer.work to DistributedWork(), or {_INSTEAD}"
            )
        if self._group is not None:
            ranks, own = (dist.get_process_group_ranks(g or dist.group.WORLD) for g in (self._group, work.group))
            if ranks != own:
                raise LayerwiseError(
                    f"noise reference 'replicas': the model is replicated over the processes {ranks} and the optimizer "
                    f"works over {own}; set optimizer.work to DistributedWork(model.process_group)"
                )

    def _scale(self) -> Tensor | float:
        """What gradients were multiplied by since the average: by clipping their global norm, by a GradScaler."""
        pairs = [(_length(local_part(p.grad)), old) for p, old in self._averaged.items() if p.grad is not None]
        if not pairs:
            return 1.0
        device = pairs[0][0].device
        now, then = (torch.stack([n.to(device) for n in norms]).norm() for norms in zip(*pairs, strict=True))
        return torch.where(then > 0, now / then, 1.0)

    def forget(self) -> None:
        """The batch is over: its gradients were cleared."""
        self._owners, self._kept, self._averaged = None, {}, {}

    def next_turn(self) -> None:
        """The batch is over: its gradients were used, or found unusable."""
        if self._owners is not None and self._turn is not None:
            self._turn += 1
        self.forget()

    def restart(self) -> None:
        """A checkpoint was loaded."""
        self._turn = None
        self.forget()


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Where the parameters of a sharded module are, those in sharded modules within it left out."""
    for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
        yield module, name, param
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _places(child)


def _length(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
