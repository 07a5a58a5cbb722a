"""Cutting a batch into slices of whole examples, so that each probe differentiates a part of it.

The moments of a probe are quadratic in it, so their means depend on `E eps eps^T = I` alone. A probe on one slice, weighted
by the slice's part of the counted entries, has the same mean as a probe on the whole batch: provided that the outputs of an
example do not depend on the other examples, which is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.outputs import Outputs
from layerwise.function_space.measuring.process_group import ALONE, Processes

Slices = int | Literal["auto"]
#: The outputs on a batch, of which a mask says what counts.
OutputsOf = Callable[[Any, Tensor | None], Outputs]

# Values that say how to run the model and belong to no example.
_SETTINGS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Graph:
    """Outputs whose graph stands, and how they are to be probed.

    Attributes:
        outputs: of this process's examples.
        first_row: how many rows of the global batch, or of this slice of it, are before them.
        entries: how many entries count, over all processes.
        probes: how many to run.
    """

    outputs: Outputs
    first_row: int
    entries: int
    probes: int


@dataclass(frozen=True)
class Cutting:
    """How batches are cut.

    Attributes:
        slices: how many slices; `"auto"`: what leaves four probes for each.
        tolerance: how far rounding alone may move an example's outputs, relative to their norm (`rounding_of`).
        processes: those that hold parts of the batch.
    """

    slices: Slices
    tolerance: float = 1e-4
    processes: Processes = ALONE


def graphs(
    forward: OutputsOf, inputs: Any, mask: Tensor | None, probes: int, how: Cutting
) -> Iterator[Graph]:
    """The graph of each slice in turn. Drop its outputs before asking for the next: then one stands at a time.

    Padding alone has nothing to probe and is passed over.

    Raises:
        LayerwiseError: slices that cannot be had, or a batch in which nothing counts.
    """
    parts = cut(inputs, mask, probes, how)
    found = None if parts is None else _independent(forward, inputs, mask, parts[-1], how)
    if parts is None or found is None:
        outputs = forward(inputs, mask)
        first_row, entries = outputs.place(how.processes)
        if not entries:
            raise outputs.nothing_counts()
        yield Graph(outputs, first_row, entries, probes)
        return
    counted = 0
    for done, part in enumerate(reversed(parts)):
        outputs, found = found or outputs_of(forward, inputs, mask, part), None
        first_row, entries = outputs.place(how.processes)
        counted += entries
        if done == len(parts) - 1 and not counted:
            raise outputs.nothing_counts()
        if entries:
            yield Graph(outputs, first_row, entries, probes // len(parts) + (done < probes % len(parts)))
        del outputs


def _independent(
    forward: OutputsOf, inputs: Any, mask: Tensor | None, rows: range, how: Cutting
) -> Outputs | None:
    """The outputs of the slice, if its last example has the same ones in other company, or alone.

    The last, as time in the leading dimension of a causal model shows there and not in the first.
    """
    problem: Exception | None = None
    found: Outputs | None = None
    company = rows[-1:]
    if len(rows) == 1 and rows[0]:
        company = range(rows[0] - 1, rows[0] + 1)
    try:
        with torch.no_grad():
            reference = outputs_of(forward, inputs, mask, company)
        outputs = outputs_of(forward, inputs, mask, rows)
        if not rows or same_last_example(outputs, len(rows), reference, len(company), how.tolerance):
            found = outputs
    except Exception as error:  # a forward that takes whole batches only can fail in any way
        problem = error
    if how.processes.least(int(found is not None)):
        return found
    if how.slices == "auto":
        return None
    raise LayerwiseError(
        f"slices is {how.slices}, and an example's outputs depend on the other examples of its batch: use slices=1"
    ) from problem


def cut(inputs: Any, mask: Tensor | None, probes: int, how: Cutting) -> list[range] | None:
    """Which of this process's examples are in each slice of the global batch; `None` where it is to be left whole.

    Example i of the global batch is in slice i modulo their number: so all processes have examples of a slice, and
    slices do not depend on how the batch is spread. `"auto"` makes as many as leave four probes for each, and leaves
    whole what has no common leading dimension.

    Raises:
        LayerwiseError: that many slices are asked for and cannot be had.
    """
    slices, processes = how.slices, how.processes
    if slices == 1:
        return None
    mine = examples_of(inputs if mask is None else (inputs, mask))
    sizes = [size for (size,) in processes.gather([-1 if mine is None else mine])]
    examples = None if -1 in sizes else sum(sizes)
    if slices == "auto":
        count = 1 if examples is None else min(examples, probes // 4)
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
    return [range((k - before) % count, mine, count) for k in range(count)]


def examples_of(inputs: Any) -> int | None:
    """The leading size that all tensors of a batch share, or `None`."""
    sizes = _leading_sizes(inputs)
    return sizes.pop() if sizes is not None and len(sizes) == 1 else None


def outputs_of(forward: OutputsOf, inputs: Any, mask: Tensor | None, rows: range) -> Outputs:
    """The outputs of the examples in these rows.

    Where there are none, those of the first one stand in for them and count nothing: the processes that run a model
    together have to run it equally often.
    """
    held = rows or range(1)
    found = forward(_rows(inputs, held), _rows(mask, held))
    return found if rows else Outputs(found.values, torch.zeros_like(found.values, dtype=torch.bool), rows=0)


def first_examples(inputs: Any, part: int) -> Any:
    """One in `part` of the examples, from the first on; all where they have no common leading dimension."""
    examples = None if isinstance(inputs, list) else examples_of(inputs)
    return inputs if examples is None else _rows(inputs, range(-(-examples // part)))


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
    return _rows(inputs, range(*bounds))


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


def _leading_sizes(inputs: Any) -> set[int] | None:
    if isinstance(inputs, Tensor):
        return {inputs.shape[0]} if inputs.ndim else None
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if not isinstance(parts, (tuple, list)):
        return None
    found: set[int] = set()
    for part in parts:
        if isinstance(part, _SETTINGS):
            continue
        sizes = _leading_sizes(part)
        if sizes is None:
            return None
        found |= sizes
    return found


def _rows(inputs: Any, rows: range) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[rows.start : rows.stop : rows.step]
    if isinstance(inputs, Mapping):
        return {key: _rows(value, rows) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_rows(value, rows) for value in inputs)
    return inputs
