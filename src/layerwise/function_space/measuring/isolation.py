"""Run a model as it is, and leave no trace: mode, buffers, random state, autocast, `.grad` and hooks of
parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.outputs import Forward

BatchNormMode = Literal["running", "batch"]
_RUNNING_STATISTICS = nn.modules.batchnorm._NormBase


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DataParallel and DistributedDataParallel: it names the
    parameters.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; a tied one once, under its first name."""
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}


class Call(nn.Module):
    """`forward(model, inputs)` as a module, so that `torch.func.functional_call` can replace the model's
    tensors.

    Registering the model as a submodule here changes nothing in it.
    """

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self.function = forward

    def forward(self, inputs: Any) -> Any:
        return self.function(self.model, inputs)


def call_with(model: nn.Module, forward: Forward, tensors: Mapping[str, Tensor], inputs: Any) -> Any:
    """`forward(model, inputs)` with these parameters instead of the model's own, and copies of its
    buffers.
    """
    replaced: dict[str, Any] = {f"model.{name}": b.clone() for name, b in model.named_buffers()}
    replaced |= {f"model.{name}": p.detach() for name, p in model.named_parameters() if name not in tensors}
    replaced |= {f"model.{name}": t for name, t in tensors.items()}
    return torch.func.functional_call(Call(model, forward), replaced, (inputs,))


@contextmanager
def untouched(
    model: nn.Module, batch_norm: BatchNormMode = "running", autocast: torch.dtype | None = None
) -> Iterator[None]:
    """Evaluation mode without autocast (or under the given dtype), everything restored at the end, errors
    included.

    Modules are put into evaluation mode one by one, not by `model.eval()`, which a model may have overridden.
    `batch_norm="batch"` keeps BatchNorm on the batch's statistics. Recurrent layers without dropout keep
    their mode:
    it changes nothing in them, but cuDNN differentiates them in training mode only.
    """
    if batch_norm not in ("running", "batch"):
        raise LayerwiseError(f"batch_norm is {batch_norm!r}: use 'running' or 'batch'")
    devices = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    kinds = {device.type for device in devices} or {"cpu"}
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.callback(_restore_modes, modes)
        for module, _ in modes:
            if isinstance(module, _RUNNING_STATISTICS):
                module.training = batch_norm == "batch"
            elif not (isinstance(module, nn.RNNBase) and not module.dropout):
                module.training = False
        cuda = [
            d.index if d.index is not None else torch.cuda.current_device()
            for d in devices
            if d.type == "cuda"
        ]
        stack.enter_context(torch.random.fork_rng(devices=sorted(set(cuda))))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in sorted(kinds | {"cpu"}):
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, dtype=autocast, enabled=autocast is not None))
        yield


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers come back as they were, also those that the model replaces."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad(), _unsafe_preserve_version_counter(tuple(buffer for _, _, buffer, _ in kept)):
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer.copy_(value)


@contextmanager
def gradient_hooks_off(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Silence the gradient hooks that the user put on parameters (clipping, logging, optimizers that step in the
    backward): a probe is not a gradient.
    """
    silenced: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for tensor in tensors.values():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            hooks: dict[int, Any] | None = getattr(tensor, kind, None)
            if hooks:
                silenced.append((hooks, dict(hooks)))
                hooks.clear()
    try:
        yield
    finally:
        for hooks, saved in silenced:
            hooks.update(saved)
