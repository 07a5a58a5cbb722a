"""Watching optimizer steps: the weights before one, what it did to them, what that does to the outputs; and the recorder."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer

from layerwise.common.checked import PositiveInt, checked
from layerwise.common.parameter_names import unwrap, unwrap_optimizer
from layerwise.common.tensors import is_sharded, local_part, to_host
from layerwise.errors import LayerwiseError, warn
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.measuring.moments import TensorUpdate
from layerwise.function_space.measuring.outputs import Forward
from layerwise.function_space.measuring.process_group import ALONE, ProcessesOption, processes_of
from layerwise.function_space.measuring.runners import check_numbers
from layerwise.function_space.rates import JsonLines, Rates
from layerwise.function_space.steps.named_rates import Decay, constant_decay, learning_rates, optimized

#: The function that torch wraps around each class's `step`, hooks and all.
_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__
#: Of each optimizer whose step is surrounded, what is to be done once that is over.
_UNDER_WAY: WeakKeyDictionary[Optimizer, list[Callable[[], None]]] = WeakKeyDictionary()


class WatchedStep:
    """One optimizer step, with a copy of the weights before it, which this object holds.

    The optimizer works on the model's own weights, so a watched step is bit for bit a plain one.

    Args:
        model: without the wrappers that `unwrap` sees through.
        optimizer: of some or all of its parameters.
        processes: see `Measurement`.
        decay: see `FLeRM`.

    Attributes:
        parameters: the model's trainable parameters that the optimizer updates, by name.
        lrs: the learning rate that each has in its group, by name.
        old: the weights before the step, by name.
        updates: what the step did to each parameter, by name; empty until it was taken.
        decay: `lr * weight_decay` of parameters whose decay is no part of the update, by name.
        processes: those that take the step together.

    Examples:
        >>> with WatchedStep(model, optimizer).surrounded() as step:
        ...     optimizer.step()
        >>> if step.why_not() is None:
        ...     rates = step.rates(Measurement(), inputs)
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, processes: ProcessesOption = "auto", decay: Decay = "scaled"
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.parameters = optimized(model, optimizer)
        check_numbers(self.parameters)
        self.lrs = learning_rates(optimizer, self.parameters)
        self.decay = {} if decay == "scaled" else constant_decay(optimizer, self.parameters)
        self.processes = processes_of(processes)
        self.old = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.updates: dict[str, TensorUpdate] = {}

    @contextmanager
    def surrounded(self) -> Iterator[WatchedStep]:
        """Surround `optimizer.step()`, and what is done to it: FLeRM redoes steps. Once taken, what it did is noted."""
        outermost = self.optimizer not in _UNDER_WAY  # not a recorder around FLeRM, or the other way round
        waiting = _UNDER_WAY.setdefault(self.optimizer, [])
        taken = 0

        def noted(*_: Any) -> None:
            nonlocal taken
            taken += is_outermost(self.optimizer)
            self.note()

        hook = self.optimizer.register_step_post_hook(torch.compiler.disable(noted))
        try:
            yield self
        finally:
            hook.remove()
            if taken > 1:
                warn(
                    f"optimizer.step() ran {taken} times in one `with`, which is measured as one step: surround each of them"
                )
            if outermost:
                del _UNDER_WAY[self.optimizer]
        for function in waiting if outermost else ():
            function()

    def note(self) -> None:
        """The step was taken: from now on `updates` says what that did."""
        self.updates = {
            name: TensorUpdate(p.detach(), self.old[name], self.decay.get(name, 0.0)) for name, p in self.parameters.items()
        }

    def redo(self, factors: Mapping[str, float]) -> None:
        """Multiply what the step did to each of these parameters."""
        for name, factor in factors.items():
            if factor != 1.0:
                self.updates[name].block().redo(factor)
        self.note()

    def why_not(self) -> str | None:
        """Why this step has nothing to measure, if so, on any of the processes. Waits for the device once."""
        largest = {name: update.block().largest for name, update in self.updates.items()}
        peaks = [peak.item() for peak in to_host(largest, ALONE.same).values()]
        flags = [not peaks, not all(map(math.isfinite, peaks)), any(peak > 0 for peak in peaks)]
        stayed, infinite, changed = map(any, zip(*self.processes.gather(flags), strict=True))
        if stayed:
            return (
                "optimizer.step() was not run (GradScaler skips steps with inf or nan gradients, accelerate those of "
                "micro-batches that only accumulate)"
            )
        if infinite:
            return "the update is not finite"
        return None if changed else "no weight moved (a learning rate of 0, or no gradients)"

    def rates(self, measurement: Measurement, inputs: Any, mask: Tensor | None = None, seed: int | None = None) -> Rates:
        """Rates of this step on `inputs`, at the weights before it; the model's own are not touched.

        Parameters that FSDP2 shards are measured in place: the old shards go back into them meanwhile.
        """
        if not any(is_sharded(p) for p in self.model.parameters()):
            return measurement.rates(self.model, self.updates, inputs, mask, seed)
        with self.undone():
            updates = {
                name: TensorUpdate(self.old[name], p.detach(), self.decay.get(name, 0.0))
                for name, p in self.parameters.items()
            }
            return measurement.rates(self.model, updates, inputs, mask, seed)

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


def when_over(optimizer: Optimizer, function: Callable[[], None]) -> None:
    """Call a function once the optimizer's step is over: at once, unless something surrounds the step."""
    waiting = _UNDER_WAY.get(optimizer)
    if waiting is None:
        function()
    else:
        waiting.append(function)


#: Steps that were due and had nothing to measure, until it is told: a GradScaler skips some ten while it finds its scale.
MANY = 20


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
        self._unentered = False

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

    def step(self, batch: Any = None, *, mask: Tensor | None = None) -> AbstractContextManager[None]:
        """Surround one optimizer step.

        Args:
            batch: what to measure on: inputs of the model (see `function_space_rates`), or a function without
                arguments that returns them, called on measured steps only. Use other data than the step's gradient.
            mask: which outputs count.
        """
        if self._unentered:
            raise LayerwiseError(
                "step() was called without `with`, and measures nothing so: with NAME.step(batch): optimizer.step()"
            )
        self._unentered = True
        return self._around(batch, mask)

    @contextmanager
    def _around(self, batch: Any, mask: Tensor | None) -> Iterator[None]:
        self._unentered = False
        if not self.due:
            yield
            self.steps += 1
            return
        if batch is None:
            raise LayerwiseError(f"step {self.steps} is to be measured, and batch is None: give it inputs")
        scheduled = self.steps if self.pending is None else self.pending
        watched = WatchedStep(self.model, self.optimizer, self.measurement.processes, self.decay)
        with watched.surrounded() as step:
            yield
            reason = step.why_not()
            if reason is None:
                inputs = batch() if is_supplier(batch) else batch
                rates = step.rates(self.measurement, inputs, mask, self.measurement.seed + scheduled)
                self._measured(step, rates, scheduled, inputs, mask)
                self.pending = None
            else:
                self.pending, self.skipped[self.steps] = scheduled, reason
                if len(self.skipped) == MANY:
                    warn(f"{type(self).__name__} found nothing to measure in {MANY} steps that were due: {reason}")
            self.steps += 1


def is_supplier(batch: Any) -> bool:
    """Whether a batch is a function that returns one."""
    return callable(batch) and not isinstance(batch, (Tensor, Mapping))


@dataclass(frozen=True)
class Record:
    """One measured step.

    Attributes:
        step: its number.
        scheduled: the step it was due at: earlier than `step` if that one was skipped.
        rates: what the step did to the outputs.
        lrs: the learning rates in the optimizer's groups, by parameter name.
        whole: in every `difference_every`-th record, rates of the whole update, with `rates` as their first order.
    """

    step: int
    scheduled: int
    rates: Rates
    lrs: Mapping[str, float]
    whole: Rates | None = None

    def __str__(self) -> str:
        return f"step {self.step}\n{self.whole or self.rates}"

    def to_dict(self) -> dict[str, Any]:
        """One line of `function_space.jsonl`: `step`, `rates: {parameter: {value, stderr, share}}`, and how measured."""
        whole = {} if self.whole is None else {"whole": self.whole.to_dict()}
        head = {"step": self.step, "scheduled": self.scheduled, "lrs": dict(self.lrs)}
        return {**head, **self.rates.to_dict(), **whole}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Record:
        """The inverse of `to_dict`."""
        whole = Rates.from_dict(data["whole"]) if "whole" in data else None
        return Record(data["step"], data["scheduled"], Rates.from_dict(data), dict(data["lrs"]), whole)


@checked
class FunctionSpaceRecorder(StepWatcher):
    """Measures every so many optimizer steps what the step did to the outputs, and changes nothing.

    Each record averages its probes at that one step, never across steps: an average over steps of a quantity that falls a
    hundredfold after the first one shows mostly its own memory. A step that did not happen (GradScaler) or moved nothing
    is not measured; the next one is, in its place, and `skipped` says why.

    Args:
        model: any module.
        optimizer: any torch optimizer over some or all of the model's parameters, or a wrapper around one.
        every: measure steps 0, every, 2 * every, ... (steps are counted by `step`).
        forward: see `Measurement`.
        method: see `Measurement`.
        probes: see `Measurement`.
        seed: see `Measurement`; step n's probes are seeded `seed + n`.
        sink: called with each `Record` (on every process that measures), or a path to append JSON lines to (which the
            first of them does).
        decay: `"constant"` leaves decoupled weight decay out of the update, for `FLeRM(decay="constant")`.
        difference_every: take the outputs' difference under the whole update too (`Record.whole`), at steps 0,
            difference_every * every, ...: one more forward per tensor there.
        options: the other fields of `Measurement`.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> recorder = lw.FunctionSpaceRecorder(model, optimizer, every=100)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> with recorder.step(torch.randn(8, 3)):
        ...     optimizer.step()
        >>> list(recorder.records[0].rates)
        ['weight', 'bias']
        >>> recorder
        <FunctionSpaceRecorder of Linear under SGD: parameters=2, steps=1>
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        every: PositiveInt = 100,
        *,
        forward: Forward | str | None = None,
        method: str = "full_cov",
        probes: PositiveInt = 64,
        seed: int = 0,
        sink: Callable[[Record], object] | str | Path | None = None,
        decay: Decay = "scaled",
        difference_every: PositiveInt | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, Measurement(forward, method, probes, seed, **options), decay)
        self.every, self.difference_every = every, difference_every
        self.sink = JsonLines(sink) if isinstance(sink, (str, Path)) else sink
        self.records: list[Record] = []

    @property
    def due(self) -> bool:
        """Whether the coming step will be measured."""
        return self.pending is not None or self.steps % self.every == 0

    def _measured(self, step: WatchedStep, rates: Rates, scheduled: int, inputs: Any, mask: Tensor | None) -> None:
        whole = None
        if self.difference_every is not None and (scheduled // self.every) % self.difference_every == 0:
            difference = replace(self.measurement, method="difference", linear=None)
            whole = step.rates(difference, inputs, mask).beside(rates)
        self.records.append(Record(self.steps, scheduled, rates, step.lrs, whole))
        if self.sink is not None and (not isinstance(self.sink, JsonLines) or step.processes.rank == 0):
            self.sink(self.records[-1])

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: where the count of steps stands. Records are the sink's business."""
        return {"steps": self.steps, "pending": self.pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the count of `state_dict`; a file's records of later steps are dropped, as they are taken again."""
        self.steps, self.pending = state["steps"], state["pending"]
        if isinstance(self.sink, JsonLines) and processes_of(self.measurement.processes).rank == 0:
            self.sink.rewind(self.steps)
