"""Measuring: `function_space_rates`, and the settings that a recorder or FLeRM measures with."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.collect import collector_for
from layerwise.function_space.measuring.estimators import (
    METHODS,
    Estimator,
    TensorUpdate,
    combine,
    estimator_for,
)
from layerwise.function_space.measuring.exact import rate_of
from layerwise.function_space.measuring.isolation import (
    BatchNormMode,
    trainable,
    untouched,
    unwrap,
)
from layerwise.function_space.measuring.outputs import (
    Forward,
    Outputs,
    as_outputs,
    global_rows,
    resolve,
    space_name,
)
from layerwise.function_space.measuring.probes import Distribution, draw_probes
from layerwise.function_space.measuring.process_group import (
    Processes,
    ProcessesOption,
    placed_as,
    processes_of,
)
from layerwise.function_space.measuring.runners import Prober, Runner, runner_for
from layerwise.function_space.measuring.slices import Slices, graphs, rounding_of
from layerwise.function_space.rates import Rate, Rates, shares


@dataclass(frozen=True)
class Measurement:
    """How to measure: everything but the model, the update and the inputs.

    forward: `forward(model, inputs)` returns the outputs, or `(outputs, mask)`; or `"log_softmax"`; default the
        model's output, a tensor or `.logits`.
    method: `"kronecker"`, `"full_cov"`, `"iid"` or `"exact"` (one forward-mode pass per tensor, no probes).
    probes: how many, over all batches together. probe: their distribution. seed: of a generator of our own.
    batch_norm: `"running"` (evaluation mode) or `"batch"`: the batch's statistics; the running ones do not move.
    autocast: a dtype to run the forward under; by default none, even inside the caller's autocast.
    slices: how many slices of whole examples to cut a batch into; each probe differentiates one of them, so that 32
        probes on 8 slices cost four backwards of the batch. The estimators' means stay the same. `"auto"`: four probes a
        slice where examples do not depend on one another, one slice where they do.
    memory: bytes that gradients of probes taken together may use.
    processes: which processes hold parts of one global batch and measure together: `"auto"`, all of
        torch.distributed where it is initialised; a process group; or `None`: this process by itself.
    """

    forward: Forward | str | None = None
    method: str = "kronecker"
    probes: int = 32
    seed: int = 0
    probe: Distribution = "rademacher"
    batch_norm: BatchNormMode = "running"
    autocast: torch.dtype | None = None
    memory: int = 64 << 20
    processes: ProcessesOption = "auto"
    slices: Slices = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise LayerwiseError(f"method is {self.method!r}: use one of {', '.join(METHODS)}")
        if self.probes < 1:
            raise LayerwiseError(f"probes is {self.probes}: use at least 1")
        if self.probe not in ("rademacher", "gaussian"):
            raise LayerwiseError(f"probe is {self.probe!r}: use 'rademacher' or 'gaussian'")
        if self.slices != "auto" and (not isinstance(self.slices, int) or self.slices < 1):
            raise LayerwiseError(f"slices is {self.slices!r}: use 'auto' or a number from 1 on")
        resolve(self.forward)

    @property
    def space(self) -> str:
        """The output space's name."""
        return space_name(resolve(self.forward))

    def rates(
        self,
        model: nn.Module,
        updates: Mapping[str, TensorUpdate],
        inputs: Any,
        mask: Tensor | None = None,
        at: Mapping[str, Tensor] | None = None,
    ) -> Rates:
        """Rates of `updates` on `inputs` (a list: batches of equal weight), at the weights `at` (default: now)."""
        model = unwrap(model)
        batches = inputs if isinstance(inputs, list) else [inputs]
        if not batches:
            raise LayerwiseError("inputs is an empty list: pass at least one batch")
        if isinstance(inputs, list) and mask is not None:
            raise LayerwiseError("mask= goes with one batch: for a list let forward return (outputs, mask)")
        points = dict(trainable(model)) if at is None else {**trainable(model), **at}
        measure = self._exact if self.method == "exact" else self._probed
        with (
            untouched(model, self.batch_norm, self.autocast),
            runner_for(model, points, updates, processes_of(self.processes)) as runner,
        ):
            return measure(runner, updates, batches, mask)

    def _outputs(self, runner: Runner, batch: Any, mask: Tensor | None) -> Outputs:
        return as_outputs(runner.outputs(resolve(self.forward), batch), mask)

    def _probed(
        self, runner: Runner, updates: Mapping[str, TensorUpdate], batches: list[Any], mask: Tensor | None
    ) -> Rates:
        run = ProbeRun(self, updates)
        rounding = rounding_of(runner.model, self.autocast)
        for index, batch in enumerate(batches):
            count = max(1, self.probes // len(batches) + (index < self.probes % len(batches)))
            forward = partial(self._outputs, runner)
            for outputs, probes in graphs(forward, batch, mask, self.slices, count, run.processes, rounding):
                run.add(outputs, runner, probes, batch=index)
                del outputs
        return run.rates()

    def of_outputs(
        self,
        outputs: Any,
        updates: Mapping[str, TensorUpdate],
        prober: Prober,
        mask: Tensor | None = None,
    ) -> Rates:
        """Rates from outputs that the caller computed and whose graph still stands, which `prober` differentiates."""
        if self.method == "exact":
            raise LayerwiseError(
                "method='exact' needs inputs, not outputs: it runs forward-mode passes of its own"
            )
        if self.slices not in ("auto", 1):
            raise LayerwiseError(
                f"slices is {self.slices}, and outputs= has one graph for all examples: use slices=1, or pass the batch"
            )
        picked = as_outputs(outputs, mask)
        run = ProbeRun(self, updates)
        run.add(picked, prober, self.probes)
        return run.rates()

    def _exact(
        self, runner: Runner, updates: Mapping[str, TensorUpdate], batches: list[Any], mask: Tensor | None
    ) -> Rates:
        found: dict[str, list[Tensor]] = {name: [] for name in updates}
        entries, classes, dtype = 0, 1, ""
        processes = processes_of(self.processes)
        for batch in batches:
            counted = 0
            for name, update in updates.items():
                derivative = runner.derivative(resolve(self.forward), batch, mask, name, update)
                if not counted:
                    _, counted = global_rows(derivative.outputs, processes)
                    classes, dtype = _classes(derivative.outputs), _short(derivative.outputs.values.dtype)
                square = derivative.log_square()
                if processes.count > 1:
                    square = processes.sum_(square.double().exp()).log()
                found[name].append(square - math.log(counted))
            entries += counted
        pulled = _pull(found, processes)
        values = {name: (rate_of(squares[:, 0].tolist()), 0.0, "exact") for name, squares in pulled.items()}
        return self._result(values, 0, entries, classes, dtype)

    def _result(
        self,
        values: Mapping[str, tuple[float, float, str]],
        probes: int,
        entries: int,
        classes: int,
        dtype: str,
    ) -> Rates:
        part = shares({name: value for name, (value, _, _) in values.items()})
        rates = {
            name: Rate(value, stderr, part[name], estimator)
            for name, (value, stderr, estimator) in values.items()
        }
        return Rates(rates, self.method, probes, self.seed, entries, self.space, classes, dtype)


class ProbeRun:
    """Collects probes over batches, then makes them into rates with one synchronisation with the device."""

    def __init__(self, measurement: Measurement, updates: Mapping[str, TensorUpdate]) -> None:
        self.measurement = measurement
        self.updates = updates
        self.estimators: dict[str, Estimator] = {
            name: estimator_for(measurement.method, tuple(u.new.shape)) for name, u in updates.items()
        }
        self.moments: dict[str, list[Tensor]] = {name: [] for name in updates}
        self.processes = processes_of(measurement.processes)
        self.parts: list[tuple[int, int, int]] = []  # batch, entries, probes
        self.classes, self.dtype = 1, ""

    def add(self, outputs: Outputs, prober: Prober, count: int, batch: int = 0) -> None:
        """Run `count` probes of these outputs: all of a batch's, or those of one slice of it."""
        first_row, entries = global_rows(outputs, self.processes)
        collector = collector_for(self.processes, self.estimators, self.updates, self.measurement.method)
        settings, before = self.measurement, sum(probes for *_, probes in self.parts)
        probes = draw_probes(outputs, count, settings.probe, settings.seed, before, first_row)
        prober.probe(outputs, probes, collector, settings.memory)
        for name, moments in collector.moments.items():
            self.moments[name].append(moments.logs(count) - math.log(entries))
        self.parts.append((batch, entries, count))
        self.classes, self.dtype = _classes(outputs), _short(outputs.values.dtype)

    def rates(self) -> Rates:
        """The rates of all probes so far."""
        values, weights = {}, self.weights()
        for name, moments in _pull(self.moments, self.processes).items():
            estimator = self.estimators[name]
            values[name] = (*combine(estimator.exponents, moments, weights), estimator.name)
        entries = sum(entries for _, entries, _ in self.parts)
        return self.measurement._result(values, len(weights), entries, self.classes, self.dtype)

    def weights(self) -> Tensor:
        """Of each probe: batches count alike, slices of a batch by their entries, probes of a slice alike."""
        totals: dict[int, int] = defaultdict(int)
        for batch, entries, _ in self.parts:
            totals[batch] += entries
        return torch.tensor(
            [
                entries / totals[batch] / len(totals) / count
                for batch, entries, count in self.parts
                for _ in range(count)
            ],
            dtype=torch.float64,
        )


def function_space_rates(
    model: nn.Module,
    update: Mapping[str, Tensor],
    inputs: Any,
    forward: Forward | str | None = None,
    method: str = "kronecker",
    probes: int = 32,
    seed: int = 0,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> Rates:
    """What an update does to the model's outputs, to first order, tensor by tensor (arXiv 2502.17405).

    The rate of tensor l is the RMS over output entries of the derivative of the outputs along `dW_l`, the
    other tensors staying at their present values. Nothing is touched: weights, `.grad`, buffers, train/eval
    mode, global random state and autocast are as before.

    Args:
        model: any module; wrappers of torch.compile and data parallelism are seen through.
        update: parameter name -> dW, in the parameter's shape. Frozen parameters are left out of the result.
        inputs: a tensor, a tuple (positional arguments), a dict (keywords), or a list of such batches.
        forward: `forward(model, inputs)` returns the outputs, or `(outputs, mask)`; `"log_softmax"` by name.
        method: `"kronecker"`, `"full_cov"`, `"iid"`, or `"exact"`.
        probes: number of random probes, each one backward pass. seed: of the probes.
        mask: which outputs count, of the shape that the outputs' shape begins with (such as `[batch,
        positions]`).
            For dict inputs with an `attention_mask` that mask is the default.
        options: the other fields of `Measurement`.

    Raises:
        LayerwiseError: an unknown name, a wrong shape, or outputs that cannot be measured.
    """
    inner = unwrap(model)
    known = dict(inner.named_parameters())
    for name, delta in update.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ": use names of model.named_parameters()"
            raise LayerwiseError(f"update holds {name!r}, which is no parameter of the model{hint}")
        if delta.shape != known[name].shape:
            raise LayerwiseError(
                f"update[{name!r}] has shape {tuple(delta.shape)}, the parameter {tuple(known[name].shape)}"
            )
    free = trainable(inner)
    updates = {name: TensorUpdate(placed_as(update[name], p)) for name, p in free.items() if name in update}
    measurement = Measurement(forward, method, probes, seed, **options)
    return measurement.rates(inner, updates, inputs, mask)


def _pull(found: Mapping[str, list[Tensor]], processes: Processes) -> dict[str, Tensor]:
    """Bring `[rows, columns]` tensors of every name to the CPU in one copy, the same on every process."""
    parts = {
        name: torch.cat([t.reshape(t.shape[0] if t.ndim else 1, -1) for t in ts])
        for name, ts in found.items()
    }
    if not parts:
        return {}
    devices = {t.device for t in parts.values()}
    home = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
    flat = torch.cat(
        [
            t.detach().reshape(-1).to(home, torch.float32 if home.type == "mps" else torch.float64)
            for t in parts.values()
        ]
    )
    flat = processes.same(flat).cpu().double()
    result, position = {}, 0
    for name, t in parts.items():
        result[name] = flat[position : position + t.numel()].reshape(t.shape)
        position += t.numel()
    return result


def _classes(outputs: Outputs) -> int:
    return outputs.values.shape[-1] if outputs.values.ndim else 1


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
