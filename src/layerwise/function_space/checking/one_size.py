"""A few optimizer steps of a model of one size, and what they do to each module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.common.parameter_names import unwrap_optimizer
from layerwise.common.running import call_given
from layerwise.common.tensors import widened
from layerwise.function_space.checking.checked_batches import inputs_of
from layerwise.function_space.checking.size_check import Quantity, Value
from layerwise.function_space.matching.base_rates import BaseRates
from layerwise.function_space.matching.depth_map import DepthMap
from layerwise.function_space.matching.flerm import FLeRM
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.measuring.outputs import Forward, resolve
from layerwise.function_space.measuring.runners import LeafRunner, in_evaluation_mode
from layerwise.function_space.measuring.slices import each_tensor
from layerwise.function_space.rates import Rates
from layerwise.function_space.steps.by_module import ROOT, by_module, module_of, module_updates, update_sums
from layerwise.function_space.steps.step_loss import Loss
from layerwise.function_space.steps.watched_step import WatchedStep, watch

#: What is measured at one step: quantity -> module -> value.
Readings = Mapping[Quantity, Mapping[str, Value]]


@dataclass(frozen=True)
class Recipe:
    """What is trained and how it is measured, whatever the size.

    Attributes:
        make_model, make_optimizer: see `check`.
        batches: one a step, then one to match and one to measure on.
        loss: of a batch.
        steps: the optimizer steps that are measured, from 1 on.
        measurement: of function-space rates.
        match: what FLeRM matches to; None: nothing.
        depth: FLeRM's depth map.
        match_step: the step that FLeRM matches, from 1 on.
    """

    make_model: Callable[[Any], nn.Module]
    make_optimizer: Callable[[nn.Module], Optimizer]
    batches: Sequence[Any]
    loss: Loss
    steps: Sequence[int]
    measurement: Measurement
    match: BaseRates | str | None = None
    depth: DepthMap | None = None
    match_step: int = 1


class SizeRun:
    """A fresh model of one size and its optimizer, seeded."""

    def __init__(self, recipe: Recipe, size: Any, seed: int) -> None:
        self.recipe = recipe
        torch.manual_seed(seed)
        self.model = recipe.make_model(size)
        self.model.train()
        needed = "the model, as lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)"
        made = call_given("make_optimizer", recipe.make_optimizer, self.model, needed=needed)
        self.optimizer = unwrap_optimizer(made)
        device = next(self.model.parameters()).device
        self.batches = [each_tensor(batch, lambda tensor: tensor.to(device)) for batch in recipe.batches]
        self.measurement = replace(recipe.measurement, seed=recipe.measurement.seed + seed)

    @property
    def options(self) -> dict[str, Any]:
        """How a recorder or FLeRM measures: with other probes than the result's, which would hide their own noise."""
        keys = ("forward", "method", "probes", "batch_norm", "autocast", "memory", "slices")
        found = {key: getattr(self.measurement, key) for key in keys}
        return {**found, "seed": self.measurement.seed + (1 << 20)}

    def backward(self, step: int) -> None:
        """The gradient of one step's batch, counted from 0."""
        self.optimizer.zero_grad()
        self.recipe.loss(self.model, self.batches[step]).backward()

    def measure(self) -> dict[int, Readings]:
        """Train up to the last of the measured steps, and read what those did."""
        recipe, inputs = self.recipe, inputs_of(self.batches[-1])
        flerm = self._flerm()
        activations = Activations(self.model, self.measurement.forward, inputs)
        found: dict[int, Readings] = {}
        for step in range(1, max(recipe.steps) + 1):
            self.backward(step - 1)
            around = nullcontext() if flerm is None else flerm.step(inputs_of(self.batches[-2]))
            if step not in recipe.steps:
                with around:
                    self.optimizer.step()
                continue
            with watch(self.model, self.optimizer) as watched, around:
                self.optimizer.step()
            found[step] = self._read(watched, activations, inputs)
        return found

    def _flerm(self) -> FLeRM | None:
        match, options = self.recipe.match, self.options
        if match is None:
            return None
        if isinstance(match, BaseRates):
            options["method"] = None  # the base's
        return FLeRM(self.model, self.optimizer, match, self.recipe.depth, at=self.recipe.match_step - 1, **options)

    def _read(self, watched: WatchedStep, activations: Activations, inputs: Any) -> Readings:
        rates = watched.rates(self.measurement, inputs)
        sizes, changes = activations.read()
        modules = module_updates(update_sums(watched.updates, steps=16))
        return {
            "rate": _module_rates(rates),
            "activation": {name: Value(value) for name, value in sizes.items()},
            "activation_change": {name: Value(value) for name, value in changes.items()},
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
        names = {module_of(name) for name, p in self.model.named_parameters() if p.requires_grad}
        with in_evaluation_mode(self.model), torch.no_grad():  # which takes the hooks off again
            for name, module in self.model.named_modules():
                if (name or ROOT) in names:
                    module.register_forward_hook(partial(_catch, found, name or ROOT))
            self.runner.outputs(self.inputs, None)
        return found


def _catch(found: dict[str, list[Tensor]], name: str, module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook, which keeps a copy of the output: it may be changed in place."""
    tensor = _first_tensor(output)
    if tensor is not None:
        found.setdefault(name, []).append(tensor.detach().float().clone())


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
    return float(torch.stack([widened(t).square().sum() for t in tensors]).sum() / entries) ** 0.5
