"""Cutting a batch into slices of whole examples, so that each probe differentiates a part of it.

The moments of a probe are quadratic in it, so their means depend on `E eps eps^T = I` alone. A probe on one slice, weighted
by the slice's part of the counted entries, has the same mean as a probe on the whole batch: provided that the outputs of an
example do not depend on the other examples, which is checked (`graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.common.checked import PositiveInt
from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.process_group import ALONE, Processes

#: How many slices; `"auto"`: what leaves four probes for each.
Slices = PositiveInt | Literal["auto"]

# Values that say how to run the model and belong to no example.
_SETTINGS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Slice:
    """A part of the global batch that has probes of its own.

    Attributes:
        rows: which of this process's examples are in it.
        probes: how many it gets.
    """

    rows: range
    probes: int


def cut(inputs: Any, mask: Tensor | None, probes: int, slices: Slices, processes: Processes = ALONE) -> list[Slice] | None:
    """The slices of the global batch, the last first; `None` where it is to be left whole.

    Example i of the global batch is in slice i modulo their number: so all processes have examples of a slice, and
    slices do not depend on how the batch is spread. `"auto"` makes as many as leave four probes for each, and leaves
    whole what has no common leading dimension.

    Raises:
        LayerwiseError: that many slices are asked for and cannot be had.
    """
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
    return [
        Slice(range((k - before) % count, mine, count), probes // count + (done < probes % count))
        for done, k in enumerate(reversed(range(count)))
    ]


def examples_of(inputs: Any) -> int | None:
    """The leading size that all tensors of a batch share, or `None`."""
    sizes = _leading_sizes(inputs)
    return sizes.pop() if sizes is not None and len(sizes) == 1 else None


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


def rows_of(inputs: Any, rows: range) -> Any:
    """These examples of a batch."""
    return each_tensor(inputs, lambda t: t[rows.start : rows.stop : rows.step])


def stacked(inputs: Any, slices: Sequence[Slice]) -> Any:
    """The examples of several slices of one size, `[slices, examples, ...]`."""
    several = [rows_of(inputs, each.rows) for each in slices]
    tensors: list[list[Tensor]] = [[] for _ in several]
    for held, each in zip(tensors, several, strict=True):
        each_tensor(each, held.append)
    together = map(torch.stack, zip(*tensors, strict=True))
    return each_tensor(several[0], lambda _: next(together))


def each_tensor(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """The batch with a function's values in the place of its tensors."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: each_tensor(value, function) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(each_tensor(value, function) for value in inputs)
    return inputs
