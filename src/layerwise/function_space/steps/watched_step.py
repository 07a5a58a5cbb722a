"""Watching optimizer steps: the weights before one, what it did to them, and what that does to the outputs."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer

from layerwise.common.parameter_names import unwrap
from layerwise.common.tensors import is_sharded, local_part
from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.measuring.moments import TensorUpdate
from layerwise.function_space.measuring.process_group import ProcessesOption, processes_of
from layerwise.function_space.rates import Rates
from layerwise.function_space.steps.named_rates import (
    Decay,
    constant_decay,
    learning_rates,
    optimized,
    unwrap_optimizer,
)

#: The function that torch wraps around each class's `step`, hooks and all.
_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__

#: Of each optimizer whose step is surrounded, what is to be done once that is over.
_UNDER_WAY: WeakKeyDictionary[Optimizer, list[Callable[[], None]]] = WeakKeyDictionary()


class WatchedStep:
    """One optimizer step: a copy of the weights before it, until `release`.

    The optimizer works on the model's own weights, so a watched step is bit for bit a plain one.

    Attributes:
        parameters: the model's trainable parameters that the optimizer updates, by name.
        lrs: the learning rate that each has in its group, by name.
        old: the weights before the step, by name.
        decay: `lr * weight_decay` of parameters whose decay is no part of the update, by name.
        processes: those that take the step together.

    Examples:
        >>> with watch(model, optimizer) as step:
        ...     optimizer.step()
        >>> if step.why_not() is None:
        ...     rates = step.rates(Measurement(), inputs)
        >>> step.release()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        processes: ProcessesOption = "auto",
        decay: Decay = "scaled",
    ) -> None:
        self.model = model
        self.parameters = optimized(model, optimizer)
        self.lrs = learning_rates(optimizer, self.parameters)
        self.decay = {} if decay == "scaled" else constant_decay(optimizer, self.parameters)
        self.processes = processes_of(processes)
        self.happened = False
        self.old = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._updates: dict[str, TensorUpdate] = {}

    def release(self) -> None:
        """Free the copy."""
        self.old, self._updates = {}, {}

    def updates(self) -> dict[str, TensorUpdate]:
        """What the step did to each parameter, once it is over."""
        if not self._updates:
            self._updates = {
                name: TensorUpdate(p.detach(), self.old[name], self.decay.get(name, 0.0))
                for name, p in self.parameters.items()
            }
        return self._updates

    def redo(self, factors: Mapping[str, float]) -> None:
        """Multiply what the step did to each of these parameters."""
        for name, factor in factors.items():
            if factor != 1.0:
                update = self.updates()[name]
                (update.block() if is_sharded(update.new) else update).redo(factor)
        self._updates = {}

    def why_not(self) -> str | None:
        """Why this step has nothing to measure, if so, on any of the processes. Waits for the device once."""
        own = [update.block() if is_sharded(update.new) else update for update in self.updates().values()]
        moved = torch.stack([update.largest.double().cpu() for update in own]).amax()
        flags = [not self.happened, not torch.isfinite(moved), bool(moved > 0)]
        stayed, infinite, changed = map(any, zip(*self.processes.gather(flags), strict=True))
        if stayed:
            return "optimizer.step() was not run (GradScaler skips steps with inf or nan gradients)"
        if infinite:
            return "the update is not finite"
        return None if changed else "no weight moved (a learning rate of 0, or no gradients)"

    def rates(self, measurement: Measurement, inputs: Any, mask: Tensor | None = None, seed: int | None = None) -> Rates:
        """Rates of this step on `inputs`, at the weights before it; the model's own are not touched.

        Parameters that FSDP2 shards are measured in place: the old shards go back into them meanwhile.
        """
        if not any(is_sharded(p) for p in self.model.parameters()):
            return measurement.rates(self.model, self.updates(), inputs, mask, self.old, self.processes, seed)
        with self.undone():
            updates = {
                name: TensorUpdate(self.old[name], p.detach(), self.decay.get(name, 0.0))
                for name, p in self.parameters.items()
            }
            return measurement.rates(self.model, updates, inputs, mask, {}, self.processes, seed)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """The weights before the step in the model, and those after it in `old`: swapped in place, and back."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        with _unsafe_preserve_version_counter(tuple(self.parameters.values())):
            for name, p in self.parameters.items():
                one, other = local_part(p.detach()), local_part(self.old[name])
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)


@contextmanager
def watch(
    model: nn.Module, optimizer: Optimizer, processes: ProcessesOption = "auto", decay: Decay = "scaled"
) -> Iterator[WatchedStep]:
    """Surround one `optimizer.step()`; afterwards the watched step says what it did. Call its `release` when done.

    Args:
        model: without the wrappers that `unwrap` sees through.
        optimizer: of some or all of its parameters.
        processes: see `Measurement`.
        decay: see `FLeRM`.
    """
    step = WatchedStep(model, optimizer, processes, decay)

    def note(*_: Any) -> None:
        step.happened = True

    hook = optimizer.register_step_post_hook(note)
    try:
        yield step
    except BaseException:
        step.release()
        raise
    finally:
        hook.remove()


def is_outermost(optimizer: Optimizer) -> bool:
    """Called from a hook of `optimizer.step`: whether no other step of the same optimizer called this one.

    An optimizer whose `step` calls that of its base class has torch call every hook twice.
    """
    steps, frame = 0, sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is _WRAPPER and frame.f_locals["args"][0] is optimizer:
            steps += 1
    return steps <= 1


@contextmanager
def under_way(optimizer: Optimizer) -> Iterator[None]:
    """Surrounds a step and what is done to it afterwards: FLeRM redoes the steps that it matches."""
    if optimizer in _UNDER_WAY:  # a recorder around FLeRM, or the other way round
        yield
        return
    waiting = _UNDER_WAY.setdefault(optimizer, [])
    try:
        yield
    finally:
        del _UNDER_WAY[optimizer]
    for function in waiting:
        function()


def when_over(optimizer: Optimizer, function: Callable[[], None]) -> None:
    """Call a function once the optimizer's step is over: at once, unless something surrounds the step."""
    waiting = _UNDER_WAY.get(optimizer)
    if waiting is None:
        function()
    else:
        waiting.append(function)


class StepWatcher(ABC):
    """Counts optimizer steps and measures those that are due: what a recorder and FLeRM have in common.

    Attributes:
        parameters: the model's that the optimizer updates, by name, when this was made.
        steps: how many steps were surrounded.
        pending: the step that was due and is still to be measured, as those since did not happen or moved nothing.
        skipped: of each step that was due and not measured, why.
    """

    def __init__(self, model: nn.Module, optimizer: Any, measurement: Measurement, decay: Decay) -> None:
        self.model = unwrap(model)
        self.optimizer = unwrap_optimizer(optimizer)
        self.measurement = measurement
        self.decay = decay
        self.parameters = optimized(self.model, self.optimizer)
        if decay == "constant":  # refused where it is not decoupled: now, not at the first step
            constant_decay(self.optimizer, self.parameters)
        self.steps = 0
        self.pending: int | None = None
        self.skipped: dict[int, str] = {}

    def __repr__(self) -> str:
        what = f"{type(self.model).__name__} under {type(self.optimizer).__name__}"
        return f"<{type(self).__name__} of {what}: parameters={len(self.parameters)}, steps={self.steps}>"

    @property
    @abstractmethod
    def due(self) -> bool:
        """Whether the coming step will be measured."""

    @abstractmethod
    def _measured(self, step: WatchedStep, rates: Rates, scheduled: int, inputs: Any, mask: Tensor | None) -> None:
        """What to do with the rates of a step on these inputs; its old weights still stand."""

    @contextmanager
    def step(self, batch: Any = None, *, mask: Tensor | None = None) -> Iterator[None]:
        """Surround one optimizer step.

        Args:
            batch: what to measure on: inputs of the model (see `function_space_rates`), or a function without
                arguments that returns them, called on measured steps only. Use other data than the step's gradient.
            mask: which outputs count.
        """
        if not self.due:
            yield
            self.steps += 1
            return
        if batch is None:
            raise LayerwiseError(f"step {self.steps} is to be measured, and batch is None: give it inputs")
        scheduled = self.steps if self.pending is None else self.pending
        with under_way(self.optimizer):
            with watch(self.model, self.optimizer, self.measurement.processes, self.decay) as step:
                yield
            try:
                reason = step.why_not()
                if reason is None:
                    inputs = batch() if is_supplier(batch) else batch
                    rates = step.rates(self.measurement, inputs, mask, self.measurement.seed + scheduled)
                    self._measured(step, rates, scheduled, inputs, mask)
            finally:
                step.release()
            if reason is None:
                self.pending = None
            else:
                self.pending, self.skipped[self.steps] = scheduled, reason
            self.steps += 1


def is_supplier(batch: Any) -> bool:
    """Whether a batch is a function that returns one."""
    return callable(batch) and not isinstance(batch, (Tensor, Mapping))
