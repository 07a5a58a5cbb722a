"""A few optimizer steps of a model of one size, on batches that all sizes share, and what they do to each module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from layerwise.common.parameter_names import unwrap_optimizer
from layerwise.common.running import call_given
from layerwise.common.tensors import widened
from layerwise.errors import LayerwiseError
from layerwise.function_space.checking.size_check import Quantity, Value
from layerwise.function_space.matching.base_rates import BaseRates
from layerwise.function_space.matching.decide import DepthMap
from layerwise.function_space.matching.flerm import FLeRM
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.measuring.outputs import Forward, model_output, resolve
from layerwise.function_space.measuring.runners import Runner, in_evaluation_mode
from layerwise.function_space.measuring.slices import each_tensor
from layerwise.function_space.rates import Rates
from layerwise.function_space.steps.by_module import ROOT, by_module, module_of, module_updates
from layerwise.function_space.steps.step_loss import Loss, model_loss
from layerwise.function_space.steps.watched_step import WatchedStep

#: What is measured at one step: quantity -> module -> value.
Readings = Mapping[Quantity, Mapping[str, Value]]


class SizeRun:
    """A fresh model of one size and its optimizer, seeded.

    Args:
        make_model, make_optimizer: see `check`.
        batches: one a step, then one to match and one to measure on.
        loss: of a batch.
        measurement: of function-space rates.
        size, seed: of this run.
    """

    def __init__(
        self,
        make_model: Callable[[Any], nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
        batches: Sequence[Any],
        loss: Loss,
        measurement: Measurement,
        size: Any,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.model = make_model(size)
        self.model.train()
        needed = "the model, as lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)"
        self.optimizer = unwrap_optimizer(call_given("make_optimizer", make_optimizer, self.model, needed=needed))
        device = next(self.model.parameters()).device
        self.batches = [each_tensor(batch, lambda tensor: tensor.to(device)) for batch in batches]
        self.loss = loss
        self.measurement = replace(measurement, seed=measurement.seed + seed)

    @property
    def options(self) -> dict[str, Any]:
        """How a recorder or FLeRM measures: with other probes than the result's, which would hide their own noise."""
        keys = ("forward", "method", "probes", "batch_norm", "autocast", "memory", "slices")
        found = {key: getattr(self.measurement, key) for key in keys}
        return {**found, "seed": self.measurement.seed + (1 << 20)}

    def backward(self, step: int) -> None:
        """The gradient of one step's batch, counted from 0."""
        self.optimizer.zero_grad()
        self.loss(self.model, self.batches[step]).backward()

    def measure(
        self, steps: Sequence[int], match: BaseRates | str | None, depth: DepthMap | None, match_step: int
    ) -> dict[int, Readings]:
        """Train up to the last of `steps`, counted from 1, and read what those did; FLeRM's arguments: see `check`."""
        inputs, flerm = inputs_of(self.batches[-1]), None
        if match is not None:
            own = {"method": None} if isinstance(match, BaseRates) else {}  # the base's method
            flerm = FLeRM(self.model, self.optimizer, match, depth, at=match_step - 1, **{**self.options, **own})
        activations = Activations(self.model, self.measurement.forward, inputs)
        found: dict[int, Readings] = {}
        for step in range(1, max(steps) + 1):
            self.backward(step - 1)
            around = nullcontext() if flerm is None else flerm.step(inputs_of(self.batches[-2]))
            if step not in steps:
                with around:
                    self.optimizer.step()
                continue
            with WatchedStep(self.model, self.optimizer).surrounded() as watched, around:
                self.optimizer.step()
            found[step] = self._read(watched, activations, inputs)
        return found

    def _read(self, watched: WatchedStep, activations: Activations, inputs: Any) -> Readings:
        rates = watched.rates(self.measurement, inputs)
        sizes, changes = activations.read()
        modules = module_updates(watched.updates, steps=16)
        return {
            "rate": _module_rates(rates),
            "activation": sizes,
            "activation_change": changes,
            "update_rms": {name: Value(module.update_rms) for name, module in modules.items()},
            "spectral": {name: Value(module.spectral) for name, module in modules.items() if module.spectral is not None},
        }


def _module_rates(rates: Rates) -> dict[str, Value]:
    """Of each module the sum over its tensors: the most that together they move the outputs by."""
    return {
        module: Value(sum(rates[name].value for name in names), math.hypot(*(rates[name].stderr for name in names)))
        for module, names in by_module(rates).items()
    }


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
        self.runner = Runner(model, resolve(forward), {})
        self.start = self._outputs()

    def read(self) -> tuple[dict[str, Value], dict[str, Value]]:
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
        names = {module_of(name) for name, p in self.model.named_parameters() if p.requires_grad}

        def keep(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None:  # it may be changed in place
                found.setdefault(name, []).append(tensor.detach().float().clone())

        with in_evaluation_mode(self.model), torch.no_grad():  # which takes the hooks off again
            for name, module in self.model.named_modules():
                if (name or ROOT) in names:
                    module.register_forward_hook(partial(keep, name or ROOT))
            self.runner.outputs(self.inputs, None)
        return found


def _first_tensor(output: Any) -> Tensor | None:
    """The output, its `.logits`, or its first part (of an LSTM, of an attention)."""
    for candidate in (output, getattr(output, "logits", None)):
        if isinstance(candidate, Tensor):
            return candidate if candidate.is_floating_point() else None
    if isinstance(output, (tuple, list)) and output:
        return _first_tensor(output[0])
    return None


def _rms(tensors: list[Tensor]) -> Value:
    entries = sum(t.numel() for t in tensors)
    if not entries:
        return Value(0.0)
    return Value(float(torch.stack([widened(t).square().sum() for t in tensors]).sum() / entries) ** 0.5)


def batches(batch: Any, steps: int) -> list[Any]:
    """Batches for `steps` training steps, one to match and one to measure on: the same for every size.

    Args:
        batch: one batch (a tensor, a tuple or a dict), taken every time; a function of the step, from 0 on; or anything that
            yields batches (a list, a DataLoader), gone through again where it is too short.
        steps: how many training steps there are.

    Raises:
        LayerwiseError: there is no batch.
    """
    count = steps + 2
    if isinstance(batch, (Tensor, tuple, Mapping)):
        return [batch] * count
    if callable(batch):
        return [batch(step) for step in range(count)]
    if not isinstance(batch, Iterable):
        raise LayerwiseError(
            f"batch is {type(batch).__name__}: give a tensor, a tuple, a dict, a function of the step or a DataLoader"
        )
    found = list(islice(batch, count))
    if not found:
        raise LayerwiseError("batch yields nothing: give at least one batch")
    return [found[index % len(found)] for index in range(count)]


def inputs_of(batch: Any) -> Any:
    """The model's inputs in a batch: the first of `(inputs, targets)`, else the batch itself."""
    return batch[0] if _is_pair(batch) else batch


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """On `(inputs, targets)` cross-entropy for whole numbers, else the squared error; else what the model itself says.

    Raises:
        LayerwiseError: targets of another shape than the outputs, or a model that says nothing.
    """
    if not _is_pair(batch):
        return model_loss(model, batch)
    result, targets = model_output(model, batch[0]), batch[1]
    outputs = result[0] if isinstance(result, tuple) else result
    whole = not targets.is_floating_point()
    if targets.numel() != (outputs[..., 0] if whole else outputs).numel():
        raise LayerwiseError(
            f"the outputs have shape {tuple(outputs.shape)}, the targets {tuple(targets.shape)}: give "
            "loss=lambda model, batch: ..., or as batch a dict of keywords for which the model returns a loss"
        )
    if whole:
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    return functional.mse_loss(outputs, targets.reshape(outputs.shape))


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
