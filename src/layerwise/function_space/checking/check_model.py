"""`check`: train a model at several sizes for a few steps, and see which modules' steps change with the size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from layerwise.common.alike_names import siblings_of
from layerwise.common.checked import PositiveInt, checked
from layerwise.common.group_by import group_by
from layerwise.common.running import call_given
from layerwise.errors import LayerwiseError
from layerwise.function_space.checking.one_size import Readings, SizeRun, batches, default_loss, inputs_of
from layerwise.function_space.checking.size_check import QUANTITIES, Quantity, SizeCheck, Trend, Value, trend
from layerwise.function_space.matching.base_rates import BaseRates, record_base
from layerwise.function_space.matching.decide import DepthMap
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.measuring.outputs import Forward
from layerwise.function_space.steps.step_loss import Loss, given_loss
from layerwise.function_space.steps.watched_step import FunctionSpaceRecorder

#: `match="first"`: match every size to the first one.
FIRST = "first"
#: The part of all rates' root sum of squares below which a module's rate is not judged. Matching has a stricter bound, by
#: the rounding of the numbers (`matching/decide.py`): a rate below that must not be divided by.
_NEGLIGIBLE = 1e-5


@checked
def check(
    make_model: Callable[[Any], nn.Module],
    sizes: Sequence[float],
    make_optimizer: Callable[[nn.Module], Optimizer],
    batch: Any,
    steps: Sequence[int] = (1, 10, 100),
    *,
    loss: Loss | None = None,
    match: str | BaseRates | None = None,
    depth: DepthMap | None = None,
    match_step: PositiveInt = 1,
    seeds: Sequence[int] = (0, 1),
    tolerance: float = 0.2,
    judge: Quantity = "rate",
    axis: str = "width",
    forward: Forward | str | None = None,
    method: str = "full_cov",
    probes: PositiveInt = 64,
    **options: Any,
) -> SizeCheck:
    """Whether one learning rate fits all sizes of a model: how each module's step changes with the size.

    Each size trains for `max(steps)` steps on the same batches, and at each of `steps` every module's function-space rate,
    the RMS of its activations and of their change since the start (muP's coordinate check), and the RMS and spectral norm of
    its update are measured. A slope of 0 of their logarithms against that of the size means that the step does the same at
    every size.

    Args:
        make_model: called with a size, returns a fresh model; torch is seeded before.
        sizes: at least two: widths, depths, LoRA ranks, initial scales, ...
        make_optimizer: called with the model, returns any torch optimizer.
        batch: one batch, a function of the step (from 0 on), or anything that yields batches. A batch is a dict of keyword
            arguments, `(inputs, targets)`, or whatever `loss` and `forward` take.
        steps: the optimizer steps to measure, counted from 1.
        loss: `loss(model, batch)`. Default: what the model returns for a dict as `.loss`, or as the one number of a tuple;
            cross-entropy or squared error of `(inputs, targets)`.
        match: FLeRM's base: `"uniform"`, `"first"` (the first size), a base file or `BaseRates`.
        depth: FLeRM's depth map.
        match_step: the step that is matched, from 1 on: LoRA's A does nothing at first, as B is 0.
        seeds: of models and probes; the spread between them gives the slopes' errors.
        tolerance: the largest slope that counts as flat.
        judge: by which quantity a module is judged: `"rate"`, or `"activation_change"` as muP's users do.
        axis: what the sizes are, in words.
        forward: runs the model on a batch's inputs; default: the model itself.
        method: how rates are measured, as in `function_space_rates`.
        probes: how many random probes.
        options: further ones of `function_space_rates`.

    Raises:
        LayerwiseError: fewer than two sizes, a step below 1, a batch without a known loss, a function that takes something
            else than it is called with.

    Examples:
        >>> def make(width):
        ...     return torch.nn.Sequential(
        ...         torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.Linear(width, 3)
        ...     )
        >>> def adam(model):
        ...     return torch.optim.Adam(model.parameters(), lr=1e-3)
        >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
        >>> result = lw.check(make, (32, 64, 128), adam, batch, steps=(1,))
        >>> print(result)  # doctest: +SKIP
        >>> result.passed
        False
    """
    _refuse(sizes, steps, seeds)
    if not tolerance >= 0:
        raise LayerwiseError(f"tolerance={tolerance}: a slope of at least 0 is needed")
    start = partial(
        SizeRun,
        _fresh(make_model),
        make_optimizer,
        batches(batch, max(steps)),
        default_loss if loss is None else partial(given_loss, loss),
        Measurement(forward, method, probes, **options),
    )
    steps = sorted(set(steps))
    with torch.random.fork_rng(), torch.enable_grad():
        if match == FIRST:
            match = record_base(partial(_base_run, start, sizes[0], match_step), seeds)
        found: list[list[Mapping[int, Readings]]] = []
        for size in sizes:
            found.append([start(size, seed).measure(steps, match, depth, match_step) for seed in seeds])
            if len(found) == 2 and found[0] == found[1]:  # to the last bit, of the same seeds
                raise LayerwiseError(f"make_model makes one model at sizes {sizes[0]} and {size}: have it use its argument")
    return SizeCheck(axis, list(sizes), steps, list(seeds), _trends(sizes, steps, found), tolerance, judge)


def _refuse(sizes: Sequence[float], steps: Sequence[int], seeds: Sequence[int]) -> None:
    if not 1 < len(set(sizes)) == len(sizes) or any(size <= 0 for size in sizes):
        raise LayerwiseError(f"sizes {list(sizes)}: give at least two different ones above 0, each once")
    if not steps or min(steps) < 1:
        raise LayerwiseError(f"steps {list(steps)}: give numbers from 1 on")
    if not seeds or len(set(seeds)) < len(seeds):
        raise LayerwiseError(f"seeds {list(seeds)}: give at least one, and each once")


def _fresh(make_model: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
    """The user's function, held to a new model at every call: one that was trained before would go on from there."""
    made: WeakSet[nn.Module] = WeakSet()

    def make(size: Any) -> nn.Module:
        model = call_given("make_model", make_model, size, needed="a size, as lambda width: Model(width=width)")
        if not isinstance(model, nn.Module):
            raise LayerwiseError(f"make_model({size!r}) returned {type(model).__name__}: return a torch.nn.Module")
        if model in made:
            raise LayerwiseError(
                f"make_model({size!r}) returned a model that it had returned before: make a new one each time"
            )
        made.add(model)
        return model

    return make


def _base_run(start: Callable[[Any, int], SizeRun], size: Any, match_step: int, seed: int) -> FunctionSpaceRecorder:
    """The matched step's rates at one size, on the batch that is matched on."""
    small = start(size, seed)
    recorder = FunctionSpaceRecorder(small.model, small.optimizer, max(1, match_step - 1), **small.options)
    for step in range(match_step):
        small.backward(step)
        with recorder.step(inputs_of(small.batches[-2])):
            small.optimizer.step()
    return recorder


def _trends(sizes: Sequence[float], steps: Sequence[int], found: Sequence[Sequence[Mapping[int, Readings]]]) -> list[Trend]:
    """Of every quantity and module that all sizes have; `found[size][seed][step]`."""
    trends = []
    for quantity in QUANTITIES:
        for step in steps:
            readings = [[seed[step][quantity] for seed in size] for size in found]
            if len({frozenset(values) for size in readings for values in size}) > 1:  # deeper models have other modules
                readings = [[_stacked(values, quantity) for values in size] for size in readings]
            silent = _negligible(readings) if quantity == "rate" else set()
            for module in readings[0][0]:
                if all(module in values for size in readings for values in size):
                    values = [[seed[module] for seed in size] for size in readings]
                    if module in silent:
                        values = [[Value(0.0) for _ in size] for size in values]
                    trends.append(trend(module, quantity, step, sizes, values))
    return trends


Found = list[list[Mapping[str, Value]]]


def _stacked(values: Mapping[str, Value], quantity: Quantity) -> dict[str, Value]:
    """The blocks of a stack as one, under a star for the number: rates are added, the rest is their root mean square."""
    stacks = {place: [values[name] for name in names] for place, names in group_by(values, siblings_of).items()}
    if quantity == "rate":
        return {
            name: Value(sum(v.value for v in blocks), sum(v.stderr**2 for v in blocks) ** 0.5)
            for name, blocks in stacks.items()
        }
    return {name: Value((sum(v.value**2 for v in blocks) / len(blocks)) ** 0.5) for name, blocks in stacks.items()}


def _negligible(readings: Found) -> set[str]:
    """Modules whose rate is next to nothing at every size, such as that of keys' biases: rounding noise has no slope."""
    largest: dict[str, float] = {}
    for size in readings:
        for values in size:
            total = sum(v.value**2 for v in values.values()) ** 0.5
            for name, v in values.items():
                part = v.value / total if total else 0.0
                largest[name] = max(largest.get(name, 0.0), math.inf if math.isnan(part) else part)
    return {name for name, part in largest.items() if part < _NEGLIGIBLE}
