"""A few optimizer steps of a model of one size, and what they do to each module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from layerwise.errors import LayerwiseError
from layerwise.function_space.checking.activations import Activations
from layerwise.function_space.checking.checked_batches import Loss, inputs_of, to_device
from layerwise.function_space.checking.trends import Quantity, Value
from layerwise.function_space.matching.base_rates import BaseRates
from layerwise.function_space.matching.depth_map import DepthMap
from layerwise.function_space.matching.flerm import FLeRM
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.rates import Rates
from layerwise.function_space.steps.by_module import by_module, module_updates
from layerwise.function_space.steps.named_rates import unwrap_optimizer
from layerwise.function_space.steps.update_sums import update_sums
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
        if not isinstance(self.model, nn.Module):
            raise LayerwiseError(f"make_model({size!r}) returned {type(self.model).__name__}: return a torch.nn.Module")
        self.model.train()
        self.optimizer = unwrap_optimizer(recipe.make_optimizer(self.model))
        device = next(self.model.parameters()).device
        self.batches = [to_device(batch, device) for batch in recipe.batches]
        self.measurement = replace(recipe.measurement, seed=recipe.measurement.seed + seed)

    @property
    def options(self) -> dict[str, Any]:
        """The measurement's other settings, for a recorder or FLeRM."""
        return {key: getattr(self.measurement, key) for key in ("probe", "batch_norm", "autocast", "memory", "slices")}

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
        if self.recipe.match is None:
            return None
        m = self.measurement
        method = None if isinstance(self.recipe.match, BaseRates) else m.method
        # Other probes than those that the result is measured with, which would hide their own noise.
        return FLeRM(
            self.model, self.optimizer, self.recipe.match, self.recipe.depth, forward=m.forward, method=method,
            probes=m.probes, seed=m.seed + (1 << 20), at=self.recipe.match_step - 1, **self.options,
        )  # fmt: skip

    def _read(self, watched: WatchedStep, activations: Activations, inputs: Any) -> Readings:
        updates = watched.updates()
        rates = watched.rates(self.measurement, inputs)
        sizes, changes = activations.read()
        modules = module_updates(update_sums(updates, steps=16))
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
