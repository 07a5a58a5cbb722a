"""Recording rates during training, in anybody's loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.measuring.outputs import Forward
from layerwise.function_space.measuring.process_group import processes_of
from layerwise.function_space.rates import Rates
from layerwise.function_space.steps.capture import capture_for
from layerwise.function_space.steps.optimizer_facts import Decay, decay_pulls, optimized, unwrap_optimizer


@dataclass(frozen=True)
class Record:
    """One measured step. `scheduled` is the step it was due at: earlier than `step` if that one was skipped.

    `lrs` are the learning rates in the optimizer's groups, by parameter name.
    """

    step: int
    scheduled: int
    rates: Rates
    lrs: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """One line of `function_space.jsonl`: `step`, `rates: {parameter: {value, stderr, share}}` and
        how.
        """
        return {"step": self.step, "scheduled": self.scheduled, "lrs": dict(self.lrs), **self.rates.to_dict()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Record:
        """The inverse of `to_dict`."""
        return Record(data["step"], data["scheduled"], Rates.from_dict(data), dict(data["lrs"]))


class JsonLines:
    """A sink that appends each record to a file as one line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, record: Record) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record.to_dict()) + "\n")


class FunctionSpaceRecorder:
    """Measures every so many optimizer steps what the step did to the outputs, and changes nothing.

        recorder = FunctionSpaceRecorder(model, optimizer, every=100)
        with recorder.step(batch):
            optimizer.step()

    Each record averages its probes at that one step, never across steps: an average over steps of a quantity
    that falls a hundredfold after the first one shows mostly its own memory. A step that did not happen
    (GradScaler) or moved nothing is not measured; the next one is, in its place, and `skipped` says why.

    Args:
        model, optimizer: any torch optimizer over some or all of the model's parameters, or a wrapper around
        one.
        every: measure steps 0, every, 2 * every, ... (steps are counted by `step`).
        sink: called with each `Record` (on every process that measures), or a path to append JSON lines to (which the
            first of them does).
        decay: `"constant"` leaves decoupled weight decay out of the update, for `FLeRM(decay="constant")`.
        forward, method, probes, seed, options: see `Measurement`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        every: int = 100,
        *,
        forward: Forward | str | None = None,
        method: str = "kronecker",
        probes: int = 32,
        seed: int = 0,
        sink: Callable[[Record], object] | str | Path | None = None,
        decay: Decay = "scaled",
        **options: Any,
    ) -> None:
        if every < 1:
            raise LayerwiseError(f"every is {every}: use 1 or more")
        self.model = model
        self.optimizer = unwrap_optimizer(optimizer)
        optimized(model, self.optimizer)
        self.every = every
        self.decay = decay
        self.measurement = Measurement(forward, method, probes, seed, **options)
        self.sink = JsonLines(sink) if isinstance(sink, (str, Path)) else sink
        self.records: list[Record] = []
        self.skipped: dict[int, str] = {}
        self.steps = 0
        self.pending: int | None = None

    @property
    def due(self) -> bool:
        """Whether the coming step will be measured."""
        return self.pending is not None or self.steps % self.every == 0

    @contextmanager
    def step(self, batch: Any = None, *, outputs: Any = None, mask: Tensor | None = None) -> Iterator[None]:
        """Surround one optimizer step.

        Args:
            batch: what to measure on: inputs of the model (see `function_space_rates`), or a function without
                arguments that returns them, called on measured steps only. Use other data than the step's
                gradient.
            outputs: instead of `batch`, outputs that the loop has already computed, whose graph still stands
                (`loss.backward(retain_graph=recorder.due)`): then no forward is run. They are measured as
                they
                are: in training mode, and on the batch that made the gradient.
            mask: which outputs count.
        """
        if not self.due:
            yield
            self.steps += 1
            return
        if (batch is None) == (outputs is None):
            raise LayerwiseError("recorder.step needs one of batch and outputs=, to measure on")
        scheduled = self.steps if self.pending is None else self.pending
        capture = capture_for(self.model, self.optimizer, outputs)
        with capture:
            yield
        try:
            processes = processes_of(self.measurement.processes)
            reason = capture.why_not(processes)
            if reason is None:
                inputs = outputs if outputs is not None else batch() if is_supplier(batch) else batch
                settings = dataclasses.replace(self.measurement, seed=self.measurement.seed + scheduled)
                pulls = decay_pulls(self.optimizer, capture.parameters, self.decay)
                rates = capture.measure(settings, inputs, mask, pulls)
        finally:
            capture.release()
        self.pending = None if reason is None else scheduled
        if reason is None:
            record = Record(self.steps, scheduled, rates, capture.rates_before)
            self.records.append(record)
            if self.sink is not None and (not isinstance(self.sink, JsonLines) or processes.rank == 0):
                self.sink(record)
        else:
            self.skipped[self.steps] = reason
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: where the count of steps stands. Records are the sink's business."""
        return {"steps": self.steps, "pending": self.pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the count of `state_dict`."""
        self.steps, self.pending = state["steps"], state["pending"]


def is_supplier(batch: Any) -> bool:
    """Whether a batch is a function that returns one."""
    return callable(batch) and not isinstance(batch, (Tensor, Mapping))
