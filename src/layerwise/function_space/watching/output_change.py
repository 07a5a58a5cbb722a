"""What a watched step does to the outputs: its parts, module by module, and the whole."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from layerwise.common.checked import PositiveInt, checked
from layerwise.common.tensors import widened
from layerwise.errors import LayerwiseError, warn
from layerwise.function_space.measuring.measurement import Measurement, running
from layerwise.function_space.measuring.outputs import Outputs
from layerwise.function_space.measuring.runners import MEASURED, Runner
from layerwise.function_space.measuring.slices import first_examples, share
from layerwise.function_space.steps.by_module import by_module
from layerwise.function_space.steps.watched_step import WatchedStep, is_supplier
from layerwise.function_space.watching.watch_record import Together

NOT_SEEN = (
    "the model's inputs in the step before were not seen (it is compiled, or was called by another method or under another "
    "module): give watch(batch=...)"
)


@checked
class OutputChange:
    """Measures steps in function space, on a part of the batch, as the whole costs several steps' time.

    Args:
        model: the watched model.
        batch: inputs, or a function that returns them; None: the model's own inputs in the step before.
        part: which part of these inputs to take, where they are whole examples: 4 for a quarter.
        options: the fields of `Measurement`; 8 probes where nothing is said.
    """

    def __init__(self, model: nn.Module, batch: Any = None, *, part: PositiveInt = 4, **options: Any) -> None:
        self.model = model
        self.batch = batch
        self.part = part
        self.measurement = Measurement(**{"probes": 8, **options})
        self.skipped: dict[int, str] = {}
        self._seen = SeenInputs(model)
        #: Those to measure the next step on.
        self.inputs: Any = None

    def expect(self, next_but_one: bool, next_one: bool = False) -> None:
        """Told after each step whether the one after the next, and whether the next one is to be measured."""
        if self.batch is None:
            self.inputs = self._seen.take() if next_one else None
            self._seen.listen(next_but_one)

    def measure(self, step: WatchedStep, number: int, inputs: Any) -> tuple[dict[str, float] | None, Together | None]:
        """The rate of each module, and the whole; `None, None` where there is nothing to measure, with a note.

        `inputs` is what `self.inputs` was before the step. A model that cannot be measured trains on, on one process: the
        first time a warning says why.
        """
        reason = step.why_not()
        try:
            if reason is None and self.batch is not None:
                inputs = self.batch() if is_supplier(self.batch) else share(self.batch, step.processes)
            if reason is None and inputs is not None:
                return self._measured(step, number, first_examples(inputs, self.part))
        except Exception as error:  # a forward can fail in any way
            if step.processes.count > 1:  # others may be waiting for this one
                raise
            cut = self.part > 1 and not isinstance(error, LayerwiseError)  # states may be of the whole batch's size
            hint = f"; on 1 / {self.part} of the batch, part=1 takes it whole" if cut else ""
            reason = self._told(number, f"{type(error).__name__}: {error}{hint}")
        if reason is not None or number > 1:
            self.skipped[number] = reason or self._told(number, NOT_SEEN)
        return None, None

    def _told(self, number: int, reason: str) -> str:
        """The reason, with a warning the first time: it will be the same at the next measurement."""
        if reason not in self.skipped.values():
            warn(f"watch could not measure step {number} in function space ({reason})")
        return reason

    def _measured(self, step: WatchedStep, number: int, inputs: Any) -> tuple[dict[str, float], Together]:
        measured = step.rates(self.measurement, inputs, seed=self.measurement.seed + number)
        rates = {module: sum(measured[name].value for name in names) for module, names in by_module(measured).items()}
        squares = math.fsum(rate.value**2 for rate in measured.values())
        moved = self._moved(step, inputs)
        return rates, Together(moved, sum(rates.values()), math.sqrt(squares))

    def _moved(self, step: WatchedStep, inputs: Any) -> float:
        """RMS difference of the outputs at the weights after the step and before it."""
        runner, new = self._outputs(step, inputs)
        with step.undone():
            _, old = self._outputs(step, inputs)
        difference = widened(new.values) - widened(old.values)
        if new.mask is not None:
            difference = torch.where(new.mask, difference, 0.0)
        _, [entries] = runner.count(new)
        square = step.processes.sum_(difference.square().sum()).item()
        return math.sqrt(square / entries) if entries else math.nan

    def _outputs(self, step: WatchedStep, inputs: Any) -> tuple[Runner, Outputs]:
        with running(self.measurement, self.model, {}, step.processes) as runner:
            return runner, runner.changed(inputs, None, {})


class SeenInputs:
    """Keeps what the model was last called with in training, while it is listening; a reference, no copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle: RemovableHandle | None = None

    def listen(self, wanted: bool) -> None:
        """Hook the model, or leave it alone: no longer than needed, as models with hooks are copied and saved with them."""
        if wanted and self._handle is None and not isinstance(self.model, torch.jit.ScriptModule):  # which takes no hooks
            self._handle = self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        elif not wanted and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def take(self) -> Any:
        """The inputs seen last, as measuring takes them: a tensor, a tuple of arguments, a dict of keywords; None: none."""
        seen, self._seen = self._seen, None
        if seen is None:
            return None
        args, kwargs = seen
        if not kwargs:
            return args[0] if len(args) == 1 else args
        if not args:
            return kwargs
        try:
            return dict(inspect.signature(self.model.forward).bind(*args, **kwargs).arguments)
        except (TypeError, ValueError):  # a forward that hides its names
            return None

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Not `module.training`: `from_pretrained` leaves models in evaluation mode, and many are trained in it.
        if torch.is_grad_enabled() and MEASURED not in module.__dict__:
            self._seen = (args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model that took a hook along listens to nobody."""
        return SeenInputs, (nn.Identity(),)
