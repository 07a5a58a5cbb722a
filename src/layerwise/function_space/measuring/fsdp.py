"""Measuring a model whose parameters are sharded by FSDP2 (`fully_shard`): in place, by FSDP's own communication.

FSDP gathers the weights of a block for its forward and again for its backward, and leaves each process its rows of the
gradient's mean over processes. A probe's gradient is their sum. FSDP2 allows several backwards through one graph
(it gathers again), so a probe costs what a backward does in training. Where it keeps its settings is private to torch,
and read here alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.common.running import GRADIENT_HOOKS, Writes, storage
from layerwise.common.tensors import is_sharded, local_part, or_one
from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.exact import FORWARD, Adjoint, Change
from layerwise.function_space.measuring.moments import ESTIMATORS, Moments, TensorUpdate
from layerwise.function_space.measuring.outputs import Outputs, as_outputs
from layerwise.function_space.measuring.process_group import Processes
from layerwise.function_space.measuring.runners import NO_GRAPH, WRITES, Runner

# What a backward has to be like for a probe, whatever the training loop has set.
_SETTINGS = {
    "reduce_grads": True,
    "all_reduce_grads": True,
    "gradient_divide_factor": None,  # so: the mean over processes
    "reduce_scatter_unused_params": True,  # a tensor without a gradient on some processes does not hang the others
}


def placement(name: str, param: Tensor, processes: Processes) -> tuple[int, int]:
    """The dimension that a parameter is cut along (0 if it is not), and how many processes hold the same part.

    Raises:
        LayerwiseError: for parameters cut along several mesh dimensions, or over others than the processes that measure.
    """
    assert isinstance(param, DTensor)
    mesh = param.device_mesh
    if mesh.size() != processes.count:
        raise LayerwiseError(
            f"parameter {name!r} is sharded over {mesh.size()} processes, and {processes.count} measure together: pass "
            "processes= the group of its mesh"
        )
    cuts = cuts_of(param)
    if len(cuts) > 1 or any(place.is_partial() for place in param.placements):
        raise LayerwiseError(
            f"parameter {name!r} has the placements {param.placements}: function-space rates are measured of parameters "
            "sharded by fully_shard over one mesh dimension (and replicated over others), not under tensor parallelism"
        )
    dim, pieces = cuts[0] if cuts else (0, 1)
    return dim, mesh.size() // pieces


def cuts_of(tensor: Any) -> list[tuple[int, int]]:
    """The dimensions that a tensor is cut along, and into how many pieces."""
    pairs = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return [(p.dim % max(1, tensor.ndim), size) for p, size in pairs if isinstance(p, Shard) and size > 1]


class ShardedRunner(Runner):
    """Runs the model itself, on its own parameters, inside of `in_evaluation_mode` and `as_probes_need`.

    FSDP gathers the weights of one forward at a time, so no slices are run side by side; and forward mode is not held
    against the backward here (docs/limitations.md).
    """

    def adjoint(self, batch: Any, mask: Tensor | None) -> None:
        """Nothing."""

    def outputs(self, batch: Any, mask: Tensor | None) -> Outputs:
        with nullcontext() if self.seen else Writes(self._refuse):
            found = self.settings.function(self.model, batch)
        self.seen = True
        return as_outputs(found, mask)

    def _refuse(self, written: list[Tensor]) -> None:
        """Told before something is written: what is gathered is not gathered anew for each forward."""
        places = {storage(tensor) for tensor in written if not is_sharded(tensor)}
        for name, p in self.model.named_parameters():  # while a module runs, its gathered ones
            if not is_sharded(p) and storage(p) in places and name not in self.written:
                raise LayerwiseError(WRITES.format(name))

    def probe(self, outputs: Outputs, probes: Iterator[Tensor]) -> Mapping[str, Moments]:
        """One by one: a batched backward would not go through FSDP's hooks."""
        if not outputs.values.requires_grad:
            raise LayerwiseError(NO_GRAPH)
        collector = self.collector(self.updates, ESTIMATORS[self.settings.method], self.processes)
        for probe in probes:
            torch.autograd.backward(outputs.values, probe, retain_graph=True)
            with torch.no_grad():
                for name in self.points:
                    p = self.own[name]
                    grad, p.grad = p.grad, None
                    if isinstance(grad, DTensor):
                        collector.add(name, grad.to_local()[None] * float(grad.device_mesh.size()))
                    elif grad is not None:
                        collector.add(name, grad[None])
            collector.done(1)
        return collector.moments

    def derivative(
        self, batch: Any, mask: Tensor | None, updates: Mapping[str, TensorUpdate], check: Adjoint | None
    ) -> Change:
        """In forward mode, gathered parameters replaced by dual numbers (twice in reverse would need their graph)."""
        local = {name: update.block() for name, update in updates.items()}
        largest = torch.stack([update.largest for update in local.values()]).amax()
        scale = or_one(self.processes.max_(largest))
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            # The fused kernels have no forward-mode formula.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(forward_ad.dual_level())
            for name, update in updates.items():
                direction = _whole(local[name].whole() / scale, update.new)
                stack.enter_context(_moving_along(self.model, self.own[name], direction))
            outputs = self.outputs(batch, mask)
            tangent = forward_ad.unpack_dual(outputs.values).tangent
        self._reshard()
        moved = torch.zeros_like(outputs.values) if tangent is None else tangent
        return replace(outputs, values=moved), scale, FORWARD

    @torch.no_grad()
    def changed(self, batch: Any, mask: Tensor | None, updates: Mapping[str, TensorUpdate]) -> Outputs:
        """With the updates in the parameters' own shards, which come back from a copy."""
        parameters = [self.own[name] for name in updates]
        shards = {name: local_part(self.own[name].detach()) for name in updates}
        kept = {name: shard.clone() for name, shard in shards.items()}
        with _unsafe_preserve_version_counter(tuple(parameters)):
            try:
                for name, update in updates.items():
                    shards[name].copy_(update.block().applied(kept[name]))
                return self.outputs(batch, mask)
            finally:
                for name, shard in shards.items():
                    shard.copy_(kept[name])
                self._reshard()

    def _reshard(self) -> None:
        """Without a backward, FSDP leaves the root's parameters gathered."""
        for module in _modules(self.model):
            module.reshard()


def _whole(shard: Tensor, like: Tensor) -> Tensor:
    """The tensor that these shards make up, which lie as those of `like` do."""
    if not isinstance(like, DTensor):
        return shard
    sharded = DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


@contextmanager
def _moving_along(model: nn.Module, param: nn.Parameter, direction: Tensor) -> Iterator[None]:
    """While FSDP has it gathered, the parameter is a dual number with this tangent."""
    places = [
        (owner._parameters, key) for owner in model.modules() for key, held in owner._parameters.items() if held is param
    ]
    gatherers = [
        module
        for module in _modules(model)
        for group in _groups(module)
        if any(fsdp_param.sharded_param is param for fsdp_param in group.fsdp_params)
    ]
    duals: dict[int, tuple[Tensor, nn.Parameter | None]] = {}

    def put(*_: Any) -> None:
        for place, (held, key) in enumerate(places):
            gathered = held[key]
            if place not in duals and gathered is not None:
                dual = forward_ad.make_dual(gathered.detach(), direction.to(gathered.dtype))
                duals[place] = (dual, gathered)
                held[key] = dual

    def take(*_: Any) -> None:
        for place, (dual, gathered) in duals.items():
            held, key = places[place]
            if held[key] is dual:  # otherwise FSDP has put the sharded one back
                held[key] = gathered
        duals.clear()

    handles = [module.register_forward_pre_hook(put) for module in gatherers]
    handles += [module.register_forward_hook(take, always_call=True) for module in gatherers]
    if not gatherers:
        put()
    try:
        yield
    finally:
        take()
        for handle in handles:
            handle.remove()


@contextmanager
def as_probes_need(model: nn.Module, measured: Collection[str]) -> Iterator[None]:
    """FSDP with its parameters sharded, its gradients averaged over all processes, and none kept back or handed to hooks.

    Its settings come back; gradients and hooks are left to `in_evaluation_mode`.
    """
    modules = _modules(model)
    groups = [group for module in modules for group in _groups(module)]
    managed = {id(fsdp_param.sharded_param) for group in groups for fsdp_param in group.fsdp_params}
    for name, p in model.named_parameters():
        if name in measured and isinstance(p, DTensor) and id(p) not in managed:
            raise LayerwiseError(
                f"parameter {name!r} is a DTensor that fully_shard does not manage: function-space rates are not "
                "measured under tensor parallelism"
            )
    for group in groups:
        if any(p.unsharded_accumulated_grad is not None for p in group.fsdp_params) or any(
            hasattr(p, "_unsharded_param") and p.unsharded_param.grad is not None for p in group.fsdp_params
        ):
            raise LayerwiseError(
                "FSDP holds gradients that were accumulated without synchronisation: measure after the last backward "
                "of an accumulation, with set_requires_gradient_sync(True)"
            )
    with ExitStack() as stack:

        def put(owner: Any, key: str, value: object) -> None:
            stack.callback(setattr, owner, key, getattr(owner, key))
            setattr(owner, key, value)

        for group in groups:
            for key in _SETTINGS.keys() & vars(group).keys():
                put(group, key, _SETTINGS[key])
        for module in modules:
            module.reshard()  # weights gathered earlier may be those of another step
            put(module._get_fsdp_state()._state_ctx, "is_last_backward", True)
            stack.callback(module.reshard)
        for p in model.parameters():
            p.grad = None
            # The user's (clipping, logging, optimizers that step in the backward): a probe is not a gradient.
            for name in GRADIENT_HOOKS:
                hooks = getattr(p, name)
                if hooks:
                    hooks.clear()
        yield


def _modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP gathers for."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _groups(module: Any) -> list[Any]:
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_group"):  # before torch 2.13: one or none
        return [group for group in [state._fsdp_param_group] if group is not None]
    return list(state._fsdp_param_groups)
