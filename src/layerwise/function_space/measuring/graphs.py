"""The graphs that probes are run through: of the whole batch, or of its slices, one after another or side by side.

Side by side (`Runner.side_by_side`), the slices of a batch share one forward and one backward a probe each. Where a model
is small that is what a measurement costs: starting operations, not doing them. It holds the activations of all of them, as
training does, and gradients of every parameter for every slice, for which `memory` says what there is room for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.outputs import Outputs, nothing_counts
from layerwise.function_space.measuring.runners import Runner
from layerwise.function_space.measuring.slices import Slice, cut, rows_of, stacked

if TYPE_CHECKING:
    from layerwise.function_space.measuring.measurement import Run


@dataclass(frozen=True)
class Part:
    """What one slice, or the whole batch, is in a graph.

    Attributes:
        outputs: of this process's examples.
        first_row: how many rows of the slice are before them, on other processes.
        entries: how many of its entries count, over all processes.
        probes: how many to run.
    """

    outputs: Outputs
    first_row: int
    entries: int
    probes: int


@dataclass(frozen=True)
class Graph:
    """Outputs whose graph stands, and the parts of them that are probed independently.

    Attributes:
        outputs: of one part; or of several side by side, which have as many entries and probes each.
        parts: one, or the slices that were run side by side.
    """

    outputs: Outputs
    parts: list[Part]

    @property
    def entries(self) -> int:
        """How many entries count, over all parts and processes."""
        return sum(part.entries for part in self.parts)


#: The outputs of one slice, or of several side by side.
_Forward = tuple[Outputs, list[Slice]]


def graphs(run: Run, runner: Runner, inputs: Any, mask: Tensor | None, probes: int) -> Iterator[Graph]:
    """The graph of each slice, or of several of them, in turn. Drop one before asking for the next: then one stands.

    Padding alone has nothing to probe and is passed over.

    Raises:
        LayerwiseError: slices that cannot be had, or a batch in which nothing counts.
    """
    slices = cut(inputs, mask, probes, run.settings.slices, run.processes)
    forwards = None if slices is None else _independent(run, runner, (inputs, mask), slices)
    if forwards is None:
        forwards = iter([(runner.outputs(inputs, mask), [Slice(range(0), probes)])])
    counted, masked = 0, False
    for outputs, several in forwards:
        each = [outputs.slice(k) for k in range(len(several))] if len(several) > 1 else [outputs]
        parts = [Part(o, *o.place(run.processes), s.probes) for o, s in zip(each, several, strict=True)]
        graph, masked = Graph(outputs, parts), outputs.mask is not None
        counted += graph.entries
        del outputs, each, parts  # the graph alone holds them
        if graph.entries:
            yield graph
        del graph
    if not counted:
        raise nothing_counts(masked)


def _independent(
    run: Run, runner: Runner, batch: tuple[Any, Tensor | None], slices: list[Slice]
) -> Iterator[_Forward] | None:
    """The outputs of the slices, if the last example of the first has the same ones in other company, or alone.

    That is the batch's last, as time in the leading dimension of a causal model shows there and not in its first.
    """
    problem: Exception | None = None
    found: list[_Forward] = []
    rows = slices[0].rows
    company = rows[-1:]
    if len(rows) == 1 and rows[0]:
        company = range(rows[0] - 1, rows[0] + 1)
    tolerance = rounding_of(run.model, run.settings.autocast)
    forwards: Iterator[_Forward] = iter(())
    try:
        with torch.no_grad():
            reference = outputs_of(runner, batch, company)
        room = _room(reference, len(rows) / max(1, len(company)), run.settings.memory)
        forwards = _forwards(runner, batch, slices, room)
        outputs, several = next(forwards)
        last = outputs.slice(0) if len(several) > 1 else outputs
        if not rows or same_last_example(last, len(rows), reference, len(company), tolerance):
            found = [(outputs, several)]
    except Exception as error:  # a forward that takes whole batches only can fail in any way
        problem = error
    if run.processes.least(len(found)):
        return chain(iter(found), forwards)  # an iterator that is through with a list lets go of it
    if run.settings.slices == "auto":
        return None
    raise LayerwiseError(
        f"slices is {run.settings.slices}, and an example's outputs depend on the other examples of its batch: use slices=1"
    ) from problem


def _room(example: Outputs, times: float, memory: int) -> int:
    """How many slices, of so many times these outputs, may be side by side: their gradients, and outputs' on the way."""
    weights = sum(leaf.numel() * leaf.element_size() for leaf in example.leaves.values())
    outputs = 4 * example.values.numel() * example.values.element_size() * times
    return int(memory / max(1, weights + outputs))


def _forwards(runner: Runner, batch: tuple[Any, Tensor | None], slices: list[Slice], room: int) -> Iterator[_Forward]:
    """The outputs of slices of as many examples and probes side by side, where that can be, and else of one at a time."""
    while slices:
        alike = [s for s in slices[:room] if (len(s.rows), s.probes) == (len(slices[0].rows), slices[0].probes)]
        together = _together(runner, batch, alike) if len(alike) > 1 else None
        if together is not None:
            yield together, alike
        else:
            alike, room = slices[:1], 1
            yield outputs_of(runner, batch, alike[0].rows), alike
        del together  # before the next are made
        slices = slices[len(alike) :]


def _together(runner: Runner, batch: tuple[Any, Tensor | None], slices: list[Slice]) -> Outputs | None:
    """The outputs of alike slices side by side; None where the model does not run so, or some have nothing to probe."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*performance drop.*")
            found = runner.side_by_side(*stacked(batch, slices))
    except Exception:  # a forward that looks at numbers, or writes what it shares, can fail in any way
        return None
    if found is not None and found.mask is not None and not found.mask.flatten(1).any(1).all():
        return None
    return found


def outputs_of(runner: Runner, batch: tuple[Any, Tensor | None], rows: range) -> Outputs:
    """The outputs of the examples in these rows.

    Where there are none, those of the first one stand in for them and count nothing: the processes that run a model
    together have to run it equally often.
    """
    found = runner.outputs(*rows_of(batch, rows or range(1)))
    if rows:
        return found
    return replace(found, mask=torch.zeros_like(found.values, dtype=torch.bool), rows=0)


def rounding_of(model: nn.Module, autocast: torch.dtype | None) -> float:
    """How far rounding alone may move outputs, relative to their norm: 1e-4 in float32, 5 % in half precision.

    As little as can be: a faint coupling between examples (a small residual branch that mixes them) is all there is to
    the rates of the weights in it.
    """
    dtypes = {p.dtype for p in model.parameters()} | ({autocast} if autocast else set())
    if not all(dtype.is_floating_point for dtype in dtypes):  # quantised weights
        return 0.05
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    # Convolutions on CUDA devices round to TF32 by default.
    least = 5e-3 if any(p.is_cuda for p in model.parameters()) else 1e-6
    return min(0.05, max(least, 1000 * eps))


def same_last_example(one: Outputs, examples: int, other: Outputs, others: int, tolerance: float) -> bool:
    """Whether the last example has the same outputs in two forwards, of so many examples, up to rounding."""
    first, second = one.values.detach().flatten(), other.values.detach().flatten()
    each = first.numel() // examples
    if first.numel() != each * examples or second.numel() != each * others:
        return False
    counted = torch.ones_like(first[-each:], dtype=torch.bool)
    for outputs in (one, other):
        if outputs.mask is not None:
            counted = counted & outputs.mask.flatten()[-each:]
    first, second = (torch.where(counted, x[-each:].float(), 0.0) for x in (first, second))
    return bool((first - second).norm() <= tolerance * first.norm())
