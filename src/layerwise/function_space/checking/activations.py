"""What each module puts out on one batch, and how far that has moved since the start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.function_space.measuring.outputs import Forward, resolve
from layerwise.function_space.measuring.runners import LeafRunner, untouched
from layerwise.function_space.steps.by_module import ROOT, module_of


class Activations:
    """The outputs of the modules that have parameters, on one batch, in evaluation mode.

    A module that is called several times in a forward counts with all of its calls, one that is never called (its weights
    are read by another) with none.

    Args:
        model: whose modules.
        forward, inputs: how the model is run.
    """

    def __init__(self, model: nn.Module, forward: Forward | str | None, inputs: Any) -> None:
        self.model = model
        self.inputs = inputs
        self.runner = LeafRunner(model, resolve(forward), {})
        self.start = self._outputs()

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """RMS of each module's outputs now, and RMS of their difference to the start."""
        now = self._outputs()
        sizes = {name: _rms(values) for name, values in now.items()}
        changes = {
            name: _rms([a - b for a, b in zip(values, self.start[name], strict=True)])
            for name, values in now.items()
            if name in self.start
        }
        return sizes, changes

    def _outputs(self) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        with untouched(self.model), _caught(self.model, found), torch.no_grad():
            self.runner.outputs(self.inputs, None)
        return found


@contextmanager
def _caught(model: nn.Module, found: dict[str, list[Tensor]]) -> Iterator[None]:
    """Collects the outputs of modules with parameters, while this stands."""
    names = {module_of(name) for name, p in model.named_parameters() if p.requires_grad}
    modules = dict(model.named_modules())

    def catch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None:
                # A copy: it may be changed in place.
                found.setdefault(name, []).append(tensor.detach().float().clone())

        return hook

    handles = [
        modules["" if name == ROOT else name].register_forward_hook(catch(name))
        for name in sorted(names)
        if name == ROOT or name in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(output: Any) -> Tensor | None:
    """The output, its `.logits`, or its first part (of an LSTM, of an attention)."""
    for candidate in (output, getattr(output, "logits", None)):
        if isinstance(candidate, Tensor):
            return candidate if candidate.is_floating_point() else None
    if isinstance(output, (tuple, list)) and output:
        return _first_tensor(output[0])
    return None


def _rms(tensors: list[Tensor]) -> float:
    entries = sum(t.numel() for t in tensors)
    if not entries:
        return 0.0
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum() / entries) ** 0.5
