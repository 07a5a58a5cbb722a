"""Cutting a batch into slices of whole examples, so that each probe differentiates a part of it, and their graphs.

The moments of a probe are quadratic in it, so their means depend on `E eps eps^T = I` alone. A probe on one slice, weighted
by the slice's part of the counted entries, has the same mean as a probe on the whole batch: provided that the outputs of an
example do not depend on the other examples, which is checked (`_independent`).

Graphs are of the whole batch, or of its slices, one after another or side by side. Side by side (`Runner.side_by_side`),
slices share one forward and one backward a probe each. Where a model is small that is what a measurement costs: starting
operations, not doing them. It holds the activations of all of them, as training does, and gradients of every parameter for
every slice, for which `memory` says what there is room for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from layerwise.common.checked import PositiveInt
from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.outputs import Outputs
from layerwise.function_space.measuring.process_group import ALONE, Processes

if TYPE_CHECKING:
    from layerwise.function_space.measuring.runners import Runner

#: How many slices; `"auto"`: what leaves four probes for each, and eight at least.
Slices = PositiveInt | Literal["auto"]

# Values that say how to run the model and belong to no example.
_SETTINGS = (type(None), bool, int, float, str)


class Slice(NamedTuple):
    """A part of the global batch: which of this process's examples are in it, and how many probes of its own it gets."""

    rows: range
    probes: int


def cut(inputs: Any, mask: Tensor | None, probes: int, slices: Slices, processes: Processes = ALONE) -> list[Slice] | None:
    """The slices of the global batch, the last first; `None` where it is to be left whole.

    Example i of the global batch is in slice i modulo their number: so all processes have examples of a slice, and
    slices do not depend on how the batch is spread. `"auto"` makes as many as leave four probes for each, eight of
    fewer probes, and leaves whole what has no common leading dimension.

    Raises:
        LayerwiseError: that many slices are asked for and cannot be had.
    """
    if slices == 1:
        return None
    mine = examples_of(inputs if mask is None else (inputs, mask))
    sizes = [size for (size,) in processes.gather([-1 if mine is None else mine])]
    examples = None if -1 in sizes else sum(sizes)
    if slices == "auto":
        count = 1 if examples is None else min(examples, probes, max(8, probes // 4))
    elif examples is None:
        raise LayerwiseError(
            f"slices is {slices}, and the batch cannot be cut: its tensors (and the mask) must share their leading "
            "dimension; use slices=1"
        )
    elif slices > min(examples, probes):
        raise LayerwiseError(
            f"slices is {slices}: a batch of {examples} examples and {probes} probes has {min(examples, probes)} at most"
        )
    else:
        count = slices
    if count < 2:
        return None
    assert mine is not None
    before = sum(sizes[: processes.rank])
    return [
        Slice(range((k - before) % count, mine, count), probes // count + (done < probes % count))
        for done, k in enumerate(reversed(range(count)))
    ]


def examples_of(inputs: Any) -> int | None:
    """The leading size that all tensors of a batch share, or `None`."""
    sizes, waiting = set(), [inputs]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (Mapping, tuple, list)):
            waiting += part.values() if isinstance(part, Mapping) else part
        elif isinstance(part, Tensor) and part.ndim and part.layout is torch.strided:  # a sparse one is of a whole graph
            sizes.add(part.shape[0])
        elif not isinstance(part, _SETTINGS):
            return None
    return sizes.pop() if len(sizes) == 1 else None


def first_examples(inputs: Any, part: int) -> Any:
    """One in `part` of the examples, from the first on; all where they have no common leading dimension."""
    examples = None if isinstance(inputs, list) else examples_of(inputs)
    return inputs if examples is None else rows_of(inputs, range(-(-examples // part)))


def share(inputs: Any, processes: Processes) -> Any:
    """This process's part of inputs that all processes hold: its consecutive examples, or all where they have none."""
    examples = examples_of(inputs)
    if processes.count == 1 or examples is None:
        return inputs
    if examples < processes.count:
        raise LayerwiseError(
            f"the batch to measure on has {examples} examples, and {processes.count} processes share it: give it more"
        )
    bounds = [rank * examples // processes.count for rank in (processes.rank, processes.rank + 1)]
    return rows_of(inputs, range(*bounds))


def rows_of(inputs: Any, rows: range) -> Any:
    """These examples of a batch; every other one as a copy, as a forward may ask for a `view` of them."""
    chosen = each_tensor(inputs, itemgetter(slice(rows.start, rows.stop, rows.step)))
    return chosen if rows.step == 1 else each_tensor(chosen, torch.clone)


def each_tensor(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """The batch with a function's values in the place of its tensors."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: each_tensor(value, function) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        values = [each_tensor(value, function) for value in inputs]
        return type(inputs)(*values) if hasattr(inputs, "_fields") else type(inputs)(values)
    return inputs


#: Outputs, of how many examples they are, and which one of these (from 1 on) is the first slice's last.
_Sized = tuple[Outputs, int, int]
#: The outputs of one slice, or of several side by side, and how many probes each slice gets.
_Graph = tuple[Outputs, int]


def graphs(runner: Runner, inputs: Any, mask: Tensor | None, probes: int) -> Iterator[_Graph]:
    """The outputs of each slice, or of several, in turn, with their graph. Drop one before asking for the next: then one
    stands.

    Raises:
        LayerwiseError: slices that cannot be had.
    """
    slices = cut(inputs, mask, probes, runner.settings.slices, runner.processes)
    found = None if slices is None else _independent(runner, (inputs, mask), slices)
    return iter([(runner.outputs(inputs, mask), probes)]) if found is None else found


def _independent(runner: Runner, batch: tuple[Any, Tensor | None], slices: list[Slice]) -> Iterator[_Graph] | None:
    """The slices' graphs, if the last example of the first has the same outputs in other company, or alone.

    That is the batch's last, as time in the leading dimension of a causal model shows there and not in its first.
    """
    problem: Exception | None = None
    first: list[_Graph] = []
    rows = slices[0].rows
    company = rows[-1:]
    if len(rows) == 1 and rows[0]:
        company = range(rows[0] - 1, rows[0] + 1)
    others: Iterator[_Graph] = iter(())
    try:
        with torch.no_grad():
            reference = outputs_of(runner, batch, company)
        room = reference.probes_at_once(runner.settings.memory, len(rows) / max(1, len(company)))
        others = _forwards(runner, batch, slices, room)
        first = [next(others)]
        outputs = first[0][0]
        sized = (outputs, outputs.slices * len(rows), len(rows)), (reference, len(company), len(company))
        if rows and not same_last_example(runner, *sized):
            first = []
    except Exception as error:  # a forward that takes whole batches only can fail in any way
        problem, first = error, []
    if runner.processes.least(len(first)):
        return chain(iter(first), others)  # an iterator that is through with a list lets go of it
    asked = runner.settings.slices
    if asked == "auto":
        return None
    raise LayerwiseError(
        f"slices is {asked}, and an example's outputs depend on the other examples of its batch: use slices=1"
    ) from problem


def _forwards(runner: Runner, batch: tuple[Any, Tensor | None], slices: list[Slice], room: int) -> Iterator[_Graph]:
    """The outputs of slices of as many examples and probes side by side, where that can be, and else of one at a time."""
    while slices:
        alike = [s for s in slices[:room] if (len(s.rows), s.probes) == (len(slices[0].rows), slices[0].probes)]
        outputs = None
        # A forward that looks at numbers, or writes what slices share, can fail in any way.
        with suppress(Exception), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*performance drop.*")
            if len(alike) > 1:
                rows = torch.tensor([list(s.rows) for s in alike], device="cpu")
                outputs = runner.side_by_side(*each_tensor(batch, itemgetter(rows)))
        if outputs is None or (outputs.mask is not None and not outputs.mask.flatten(1).any(1).all()):
            alike, room = slices[:1], 1
            outputs = outputs_of(runner, batch, alike[0].rows)
        yield outputs, alike[0].probes
        del outputs  # before the next are made
        slices = slices[len(alike) :]


def outputs_of(runner: Runner, batch: tuple[Any, Tensor | None], rows: range) -> Outputs:
    """The outputs of the examples in these rows.

    Where there are none, those of the first one stand in for them and count nothing: the processes that run a model
    together have to run it equally often.
    """
    found = runner.outputs(*rows_of(batch, rows or range(1)))
    if rows:
        return found
    return replace(found, mask=torch.zeros_like(found.values, dtype=torch.bool), rows=0)


def same_last_example(runner: Runner, one: _Sized, other: _Sized) -> bool:
    """Whether the last example of the first slice has the same outputs in two forwards, up to rounding.

    Relative to their norm that is 1e-4 in float32, and 5 % in half precision. As little as can be: a faint coupling between
    examples (a small residual branch that mixes them) is all there is to the rates of the weights in it.
    """
    values, counted = [], torch.ones((), dtype=torch.bool, device="cpu")
    for outputs, examples, last in (one, other):
        flat = outputs.values.detach().flatten()
        each, left = divmod(flat.numel(), examples)
        if left:
            return False
        place = slice((last - 1) * each, last * each)
        values.append(flat[place].float())
        if outputs.mask is not None:
            counted = counted.to(flat.device) & outputs.mask.flatten()[place]
    if values[0].shape != values[1].shape:
        return False
    parameters, autocast = list(runner.model.parameters()), runner.settings.autocast
    dtypes = {p.dtype for p in parameters} | ({autocast} if autocast else set())
    tolerance = 0.05  # of quantised weights
    if all(dtype.is_floating_point for dtype in dtypes):
        # Convolutions on CUDA devices round to TF32 by default.
        least = 5e-3 if any(p.is_cuda for p in parameters) else 1e-6
        tolerance = min(0.05, max(least, 1000 * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)))
    first, second = (torch.where(counted, x, 0.0) for x in values)
    return bool((first - second).norm() <= tolerance * first.norm())
