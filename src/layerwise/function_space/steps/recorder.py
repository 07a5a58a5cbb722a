"""Recording rates during training, in anybody's loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from layerwise.common.checked import PositiveInt, checked
from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.measuring.outputs import Forward
from layerwise.function_space.rates import Rates
from layerwise.function_space.steps.named_rates import Decay
from layerwise.function_space.steps.watched_step import StepWatcher, WatchedStep


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


class ToDict(Protocol):
    """A record that has plain JSON data."""

    def to_dict(self) -> dict[str, Any]: ...


class JsonLines:
    """A sink that appends each record to a file as one line of JSON."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a").close()
        except OSError as error:
            raise LayerwiseError(f"{path}: cannot be written to ({error.strerror}): name a file for the records") from None

    def __call__(self, record: ToDict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record.to_dict()) + "\n")


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
        record = Record(self.steps, scheduled, rates, step.lrs, whole)
        self.records.append(record)
        if self.sink is not None and (not isinstance(self.sink, JsonLines) or step.processes.rank == 0):
            self.sink(record)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: where the count of steps stands. Records are the sink's business."""
        return {"steps": self.steps, "pending": self.pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the count of `state_dict`."""
        self.steps, self.pending = state["steps"], state["pending"]
