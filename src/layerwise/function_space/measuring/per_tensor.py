"""Rates from the outputs' own change under each tensor's update: to first order, or the whole of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.common.undisturbed import same_random_numbers
from layerwise.function_space.measuring.exact import Change
from layerwise.function_space.measuring.moments import TensorUpdate
from layerwise.function_space.measuring.outputs import nothing_counts
from layerwise.function_space.measuring.runners import Runner

if TYPE_CHECKING:
    from layerwise.function_space.measuring.measurement import Run

#: The name of the outputs' own size among the changes.
_OUTPUTS = ""
# How far rounding in a forward moves its outputs, in roundings of their size (docs/function-space.md, "Differences").
_ROUNDINGS = 4


def exact_changes(run: Run, runner: Runner, batch: Any, mask: Tensor | None) -> Iterator[tuple[str, Change]]:
    """The outputs' derivative along each update."""
    with same_random_numbers(run.model):
        check = runner.adjoint(batch, mask, run.updates) if run.updates else None
    for name, updates in together(run).items():
        with same_random_numbers(run.model):
            change = runner.derivative(batch, mask, updates, check)
        yield name, change


def differences(run: Run, runner: Runner, batch: Any, mask: Tensor | None) -> Iterator[tuple[str, Change]]:
    """The outputs with each update less those without; first, under no name, those without.

    Layers that draw random numbers draw the same ones each time.
    """
    with same_random_numbers(run.model):
        before = runner.changed(batch, mask, {})
    one = torch.ones((), device=before.values.device)
    yield _OUTPUTS, Change(before, one, "difference")
    for name, updates in together(run).items():
        with same_random_numbers(run.model):
            after = runner.changed(batch, mask, updates)
        yield name, Change(replace(after, values=after.values - before.values), one, "difference")
        del after


#: What each method of this kind takes for the outputs' change.
CHANGES = {"exact": exact_changes, "difference": differences}


def together(run: Run) -> Mapping[str, Mapping[str, TensorUpdate]]:
    """The updates that are applied at once, under the name that their rate has."""
    label = run.settings.together
    if label is None:
        return {name: {name: update} for name, update in run.updates.items()}
    found: dict[str, dict[str, TensorUpdate]] = defaultdict(dict)
    for name, update in run.updates.items():
        found[label(name)][name] = update
    return found


def per_tensor(run: Run, runner: Runner, batches: list[Any], mask: Tensor | None) -> dict[str, tuple[float, float, str]]:
    """`(value, standard error, formula)` by name; notes the outputs and how many entries count in `run`.

    The error of a difference is what rounding does to outputs of their size; the derivative's is 0.
    """
    logs: dict[str, list[Tensor]] = defaultdict(list)
    formulas: dict[str, str] = {}
    for batch in batches:
        counted = 0
        for name, change in CHANGES[run.settings.method](run, runner, batch, mask):
            if not counted:
                _, [counted] = run.count(change.outputs)
                if not counted:
                    raise nothing_counts(change.outputs.mask is not None)
            square = change.log_square()
            if run.processes.count > 1:
                square = run.processes.sum_(square.double().exp()).log()
            logs[name].append((square - math.log(counted)).reshape(1, 1))
            formulas[name] = change.formula
    if not logs:
        return {}
    sizes = {name: root_mean(squares[:, 0].tolist()) for name, squares in run.to_cpu(logs).items()}
    rounding = _ROUNDINGS * torch.finfo(getattr(torch, run.dtype)).eps * sizes.pop(_OUTPUTS, 0.0)
    return {name: (size, rounding, formulas[name]) for name, size in sizes.items()}


def root_mean(log_squares: list[float]) -> float:
    """The root of the mean of squares given as logarithms: a rate over several batches of equal weight."""
    if any(math.isnan(value) for value in log_squares):
        return math.nan
    peak = max(log_squares)
    if peak == -math.inf:
        return 0.0
    mean = sum(math.exp(value - peak) for value in log_squares) / len(log_squares)
    return math.exp(0.5 * (peak + math.log(mean)))
