"""Running a model at weights of our choice, and leaving no trace: mode, buffers, random state, autocast, `.grad`, hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.exact import Derivative, exact_derivative
from layerwise.function_space.measuring.moments import Sink, TensorUpdate
from layerwise.function_space.measuring.outputs import Forward, Outputs, as_outputs
from layerwise.function_space.measuring.probes import run_probes

BatchNormMode = Literal["running", "batch"]
_RUNNING_STATISTICS = nn.modules.batchnorm._NormBase


class Runner(Protocol):
    """How a model is run and differentiated."""

    def outputs(self, batch: Any, mask: Tensor | None) -> Outputs:
        """The outputs on a batch, with their graph."""

    def probe(self, outputs: Outputs, probes: Iterator[Tensor], sink: Sink, memory: int) -> None:
        """Hand the gradients of every measured tensor under each probe to `sink`."""

    def derivative(self, batch: Any, mask: Tensor | None, name: str, update: TensorUpdate) -> Derivative:
        """The exact derivative of the outputs along one tensor's update."""


class LeafRunner(nn.Module):
    """Runs a model on leaves of our own in the place of its parameters: they share the weights' memory, not their `.grad`
    and hooks.

    A module around the user's, so that `torch.func.functional_call` can replace its tensors; that changes nothing in it.
    """

    def __init__(self, model: nn.Module, forward: Forward, points: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = forward
        self.points = {name: point.detach() for name, point in points.items()}
        self.leaves = {name: point.detach().requires_grad_() for name, point in points.items()}

    def forward(self, inputs: Any) -> Any:
        return self.function(self.model, inputs)

    def outputs(
        self, batch: Any, mask: Tensor | None, replaced: Mapping[str, Tensor] | None = None
    ) -> Outputs:
        """The outputs with the leaves as parameters, but for those `replaced`, and copies of the buffers."""
        tensors: dict[str, Tensor] = {name: b.clone() for name, b in self.model.named_buffers()}
        tensors |= {name: p.detach() for name, p in self.model.named_parameters() if name not in self.leaves}
        tensors |= {**self.leaves, **(replaced or {})}
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return as_outputs(torch.func.functional_call(self, named, (batch,)), mask)

    def probe(self, outputs: Outputs, probes: Iterator[Tensor], sink: Sink, memory: int) -> None:
        run_probes(outputs, self.leaves, probes, sink, memory)

    def derivative(self, batch: Any, mask: Tensor | None, name: str, update: TensorUpdate) -> Derivative:
        def outputs(tensor: Tensor) -> Outputs:
            return self.outputs(batch, mask, {**self.points, name: tensor})

        return exact_derivative(outputs, self.points[name], update)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DataParallel and DistributedDataParallel: it names the parameters."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; a tied one once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def untouched(
    model: nn.Module, batch_norm: BatchNormMode = "running", autocast: torch.dtype | None = None
) -> Iterator[None]:
    """Evaluation mode without autocast (or under the given dtype), everything restored at the end, errors included.

    Modules are put into evaluation mode one by one, not by `model.eval()`, which a model may have overridden.
    `batch_norm="batch"` keeps BatchNorm on the batch's statistics. Recurrent layers without dropout keep their mode: it
    changes nothing in them, but cuDNN differentiates them in training mode only.
    """
    if batch_norm not in ("running", "batch"):
        raise LayerwiseError(f"batch_norm is {batch_norm!r}: use 'running' or 'batch'")
    devices = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    gpus = {
        d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"
    }
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(gpus)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in sorted({device.type for device in devices} | {"cpu"}):
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, dtype=autocast, enabled=autocast is not None))
        try:
            for module, _ in modes:
                if isinstance(module, _RUNNING_STATISTICS):
                    module.training = batch_norm == "batch"
                elif not (isinstance(module, nn.RNNBase) and not module.dropout):
                    module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
