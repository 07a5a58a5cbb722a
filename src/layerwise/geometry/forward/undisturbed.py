"""Leaving a model as it was: what a forward pass may change is kept, and put back."""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


@contextmanager
def undisturbed(model: nn.Module, training: bool = False) -> Iterator[Kept]:
    """Run the model in evaluation (or training) mode, compiled parts as they were written, and put everything back.

    Weights, gradients, attributes, buffers and modes of all modules, random numbers and settings of torch come back, errors
    included. What is given must be told of writes into tensors (`Kept.before_writing`).
    """
    kept = Kept(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(_unsafe_preserve_version_counter(kept.counted))
        stack.callback(kept.put_back)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
        stack.enter_context(torch.inference_mode(False))  # which turns gradients on
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_eager())
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            module.training = training
            if getattr(module, "max_norm", None) is not None:
                module.__dict__["max_norm"] = None  # such an embedding changes its weight whenever it is read
        yield kept


def _eager() -> Any:
    """Compiled functions run as they were written: compiled code cannot be watched."""
    stance = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance is not None else nullcontext()


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


class Kept:
    """What a forward pass may change of a model.

    Weights and gradients are copied when something first writes into them, which is rare.

    Args:
        model: the model.

    Attributes:
        counted: the tensors whose version counters are to stay as well.
    """

    def __init__(self, model: nn.Module) -> None:
        plain = [p for p in model.parameters() if type(p) is nn.Parameter]
        self._modules = [KeptModule.of(module) for module in model.modules()]
        self._parameters = [KeptParameter(p, p.data, p.grad, p.requires_grad) for p in plain]
        self._values = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
        self._stored: dict[int, list[Tensor]] = defaultdict(list)
        gradients = [p.grad for p in plain if p.grad is not None and p.grad.layout is torch.strided]
        for tensor in (*(each.data for each in self._parameters), *gradients):
            if not tensor.is_meta:
                self._stored[tensor.untyped_storage()._cdata].append(tensor)
        held = (*(buffer for buffer, _ in self._values), *plain, *gradients)
        self.counted = tuple(tensor for tensor in held if not tensor.is_inference())

    def before_writing(self, tensors: Iterable[Tensor]) -> None:
        """Copy those weights and gradients that are about to be written to, in whole or in part."""
        for tensor in tensors:
            if tensor.layout is torch.strided:
                written = self._stored.pop(tensor.untyped_storage()._cdata, [])
                self._values += [(each, each.detach().clone()) for each in written]

    @torch.no_grad()
    def put_back(self) -> None:
        """Everything as it was."""
        for parameter in self._parameters:
            parameter.put_back()
        for tensor, value in self._values:
            tensor.copy_(value)
        for module in self._modules:
            module.put_back()


@dataclass(frozen=True)
class KeptParameter:
    """A parameter, and the tensors that it held."""

    parameter: nn.Parameter
    data: Tensor
    grad: Tensor | None
    requires_grad: bool

    def put_back(self) -> None:
        if self.parameter.untyped_storage()._cdata != self.data.untyped_storage()._cdata:
            self.parameter.data = self.data
        if self.parameter.grad is not self.grad:
            self.parameter.grad = self.grad
        self.parameter.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class KeptModule:
    """A module, its attributes, and what was in those that hold others: parameters, hooks, a list of the module's own."""

    module: nn.Module
    attributes: dict[str, Any]
    contents: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> KeptModule:
        found = {key: _contents(value) for key, value in module.__dict__.items()}
        contents = {key: value for key, value in found.items() if value is not None}
        return cls(module, dict(module.__dict__), contents)

    def put_back(self) -> None:
        # FSDP2 keeps account of the parameters it puts in and takes out.
        reshard: Any = getattr(self.module, "reshard", None)
        if reshard is not None:
            reshard()
        for key, contents in self.contents.items():
            if key != "_parameters" or reshard is None:
                _refill(self.attributes[key], contents)
        for key in self.module.__dict__.keys() - self.attributes.keys():
            del self.module.__dict__[key]
        self.module.__dict__.update(self.attributes)


def _contents(value: Any) -> Any:
    """What is in a dict, list or set, and the state of a generator of random numbers. None for all else."""
    if type(value) in (dict, OrderedDict, list, set):
        return value.copy()
    return value.get_state() if isinstance(value, torch.Generator) else None


def _refill(value: Any, contents: Any) -> None:
    if isinstance(value, torch.Generator):
        value.set_state(contents)
    elif isinstance(value, list):
        value[:] = contents
    else:
        value.clear()
        value.update(contents)
