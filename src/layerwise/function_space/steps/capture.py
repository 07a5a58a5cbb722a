"""Watching one optimizer step: the weights before it, and whether it moved them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer

from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.estimators import TensorUpdate
from layerwise.function_space.measuring.isolation import trainable, unwrap
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.measuring.process_group import Processes, is_sharded, local_part, processes_of
from layerwise.function_space.measuring.runners import GraphRunner, runner_for
from layerwise.function_space.rates import Rates
from layerwise.function_space.steps.optimizer_facts import group_of, learning_rate, optimized


class StepCapture:
    """Around one `optimizer.step()`: keeps a copy of the old weights, and forgets it when told to.

    The optimizer works on the model's own weights, so a captured step is bit for bit a plain one.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = unwrap(model)
        self.optimizer = optimizer
        self.parameters = optimized(model, optimizer)
        self.rates_before = {
            name: learning_rate(group) for name, group in group_of(optimizer, self.parameters).items()
        }
        self.stepped = False
        self.old: dict[str, Tensor] = {}

    def __enter__(self) -> StepCapture:
        self._hook = self.optimizer.register_step_post_hook(self._note)
        with torch.no_grad():
            self.old = {name: p.detach().clone() for name, p in self.parameters.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        if kind is not None:
            self.release()

    def _note(self, *_: Any) -> None:
        self.stepped = True

    def _cuda_devices(self) -> list[int]:
        return sorted({p.device.index or 0 for p in self.parameters.values() if p.device.type == "cuda"})

    def release(self) -> None:
        """Free the copy."""
        self.old = {}

    def updates(self, pulls: Mapping[str, float] | None = None) -> dict[str, TensorUpdate]:
        """What the step did to each parameter; `pulls` takes decoupled decay out of it (`lr *
        weight_decay`).
        """
        pulled = pulls or {}
        return {
            name: TensorUpdate(p.detach(), self.old[name], pulled.get(name, 0.0))
            for name, p in self.parameters.items()
        }

    def why_not(self, processes: Processes) -> str | None:
        """Why this step has nothing to measure, if so, on any of the processes. Waits for the device once."""
        blocks = [update.block() for update in self.updates().values()]
        moved = torch.stack([block.largest().double().cpu() for block in blocks]).amax()
        mine = [not self.stepped, not torch.isfinite(moved), bool(moved > 0)]
        stayed, infinite, changed = map(
            any, zip(*processes.gather([int(flag) for flag in mine]), strict=True)
        )
        if stayed:
            return "optimizer.step() was not run (GradScaler skips steps with inf or nan gradients)"
        if infinite:
            return "the update is not finite"
        return None if changed else "no weight moved (a learning rate of 0, or no gradients)"

    def measure(
        self,
        measurement: Measurement,
        inputs: Any,
        mask: Tensor | None,
        pulls: Mapping[str, float] | None = None,
    ) -> Rates:
        """Rates of this step on `inputs`, at the weights before it; the model's own are not touched."""
        return measurement.rates(self.model, self.updates(pulls), inputs, mask, at=self.old)


class GraphCapture(StepCapture):
    """The same for outputs whose graph the training loop kept: no forward is needed.

    That graph refers to the weights' memory before the step. So the optimizer gets a copy to work on, and
    afterwards the result is copied into the original memory: exact, and every alias of the weights sees it.
    """

    def __enter__(self) -> GraphCapture:
        super().__enter__()
        self._versions = _unsafe_preserve_version_counter(tuple(self.parameters.values()))
        self.original = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            # From here on `old` is the original memory, and the copy made of it takes the update.
            p.data, self.old[name] = self.old[name], self.original[name]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._settle({name: p.data for name, p in self.parameters.items()})
        super().__exit__(kind, error, trace)

    def _settle(self, new: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.data = self.original[name]
                p.copy_(new[name])
        self.original = {}

    def release(self) -> None:
        """Put the new weights into the original memory, and free the copy."""
        if self.original:
            self._settle({name: p.data for name, p in self.parameters.items()})
        super().release()

    @contextmanager
    def _as_before(self) -> Iterator[dict[str, Tensor]]:
        """The graph's own weights in place: memory and version counters as when it was recorded."""
        new = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data = self.original[name]
        self._versions.__exit__(None, None, None)
        try:
            yield new
        finally:
            for name, p in self.parameters.items():
                p.data = new[name]

    def measure(
        self,
        measurement: Measurement,
        inputs: Any,
        mask: Tensor | None,
        pulls: Mapping[str, float] | None = None,
    ) -> Rates:
        """Rates of this step on the outputs `inputs` (a tensor with its graph, or what the forward
        returned).
        """
        pulled = pulls or {}
        with self._as_before() as new, torch.random.fork_rng(devices=self._cuda_devices()):
            updates = {
                name: TensorUpdate(tensor, self.original[name], pulled.get(name, 0.0))
                for name, tensor in new.items()
            }
            with _kept_graph():
                return measurement.of_outputs(inputs, updates, GraphRunner(self.parameters), mask)


class ShardedCapture(StepCapture):
    """The same for parameters that FSDP2 shards, which are measured in place: the old shards go back into the parameters.

    What is held besides is a copy of the shards, as elsewhere of the weights.
    """

    @contextmanager
    def _as_before(self, pulls: Mapping[str, float] | None) -> Iterator[dict[str, TensorUpdate]]:
        """The old weights in the parameters, the new ones in `old`."""
        self._exchange()
        pulled = pulls or {}
        try:
            yield {
                name: TensorUpdate(self.old[name], p.detach(), pulled.get(name, 0.0))
                for name, p in self.parameters.items()
            }
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

    def measure(
        self,
        measurement: Measurement,
        inputs: Any,
        mask: Tensor | None,
        pulls: Mapping[str, float] | None = None,
    ) -> Rates:
        with self._as_before(pulls) as updates:
            return measurement.rates(self.model, updates, inputs, mask)


class ShardedGraphCapture(ShardedCapture):
    """For outputs whose graph the loop kept: FSDP gathers the weights again in each backward, so the old ones."""

    def measure(
        self,
        measurement: Measurement,
        inputs: Any,
        mask: Tensor | None,
        pulls: Mapping[str, float] | None = None,
    ) -> Rates:
        with (
            self._as_before(pulls) as updates,
            torch.random.fork_rng(devices=self._cuda_devices()),
            runner_for(self.model, self.parameters, updates, processes_of(measurement.processes)) as runner,
            _kept_graph(),
        ):
            return measurement.of_outputs(inputs, updates, runner, mask)


def capture_for(model: nn.Module, optimizer: Optimizer, outputs: Any) -> StepCapture:
    """What watches a step that is measured on `outputs`, or on a batch where they are None."""
    sharded = any(is_sharded(p) for p in trainable(model).values())
    if outputs is None:
        return (ShardedCapture if sharded else StepCapture)(model, optimizer)
    return (ShardedGraphCapture if sharded else GraphCapture)(model, optimizer)


@contextmanager
def _kept_graph() -> Iterator[None]:
    try:
        with torch.enable_grad():
            yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise LayerwiseError(
            "the graph of outputs= was freed: call loss.backward(retain_graph=recorder.due) before the step, "
            "or pass the batch instead"
        ) from error
