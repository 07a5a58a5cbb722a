"""Cutting a batch into slices of whole examples, so that each probe differentiates a part of it.

The moments of a probe are quadratic in it, so their means depend on `E eps eps^T = I` alone. A probe on one slice,
weighted by the slice's part of the counted entries, has the same mean as a probe on the whole batch: provided that
the outputs of an example do not depend on the other examples, which is checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.function_space.outputs import Outputs
from layerwise.function_space.processes import Processes

Slices = int | Literal["auto"]

# Values that say how to run the model and belong to no example.
_SETTINGS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Slice:
    """Consecutive examples of a batch: inputs for the forward, and the mask that goes with them."""

    inputs: Any
    mask: Tensor | None
    examples: int


def graphs(
    forward: Callable[[Any, Tensor | None], Outputs],
    inputs: Any,
    mask: Tensor | None,
    slices: Slices,
    probes: int,
) -> Iterator[tuple[Outputs, int]]:
    """The outputs of each slice in turn, with their graph, and how many probes to run on them.

    Drop the outputs before asking for the next: then one slice's graph stands at a time.
    """
    parts = cut(inputs, mask, slices, probes)
    found = None if parts is None else _independent(forward, parts, inputs, mask, slices)
    if parts is None or found is None:
        yield forward(inputs, mask), probes
        return
    counted = False
    for done, part in enumerate(reversed(parts)):
        outputs, found = found or forward(part.inputs, part.mask), None
        # Padding alone has nothing to probe; a batch of nothing else is for the caller to refuse.
        if outputs.entries or (done == len(parts) - 1 and not counted):
            counted = True
            yield outputs, probes // len(parts) + (done < probes % len(parts))
        del outputs


def _independent(
    forward: Callable[[Any, Tensor | None], Outputs],
    parts: list[Slice],
    inputs: Any,
    mask: Tensor | None,
    slices: Slices,
) -> Outputs | None:
    """The outputs of the last slice, if its last example has the same ones in other company (or alone).

    The last, as time in the leading dimension of a causal model shows there and not in the first.
    """
    examples, size = sum(part.examples for part in parts), parts[-1].examples
    others = 1 if size > 1 else 2
    problem: Exception | None = None
    try:
        outputs = forward(parts[-1].inputs, parts[-1].mask)
        company = take(inputs, mask, examples - others, examples)
        with torch.no_grad():
            reference = forward(company.inputs, company.mask)
        if same_last_example(outputs, size, reference, others):
            return outputs
    except Exception as error:  # a forward that takes whole batches only can fail in any way
        problem = error
    if slices == "auto":
        return None
    raise LayerwiseError(
        f"slices is {slices}, and an example's outputs depend on the other examples of its batch: use slices=1"
    ) from problem


def cut(inputs: Any, mask: Tensor | None, slices: Slices, probes: int) -> list[Slice] | None:
    """Slices of about equal size; `None` where a batch is to be left whole.

    `"auto"` makes as many as leave four probes for each, and leaves whole what has no common leading dimension.

    Raises:
        LayerwiseError: that many slices are asked for and cannot be had.
    """
    if slices == 1:
        return None
    examples = examples_of(inputs if mask is None else (inputs, mask))
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
    assert examples is not None
    bounds = [index * examples // count for index in range(count + 1)]
    return [take(inputs, mask, a, b) for a, b in itertools.pairwise(bounds)]


def examples_of(inputs: Any) -> int | None:
    """The leading size that all tensors of a batch share, or `None`."""
    sizes = _leading_sizes(inputs)
    return sizes.pop() if sizes is not None and len(sizes) == 1 else None


def take(inputs: Any, mask: Tensor | None, start: int, stop: int) -> Slice:
    """The examples `start:stop`."""
    return Slice(_rows(inputs, start, stop), None if mask is None else mask[start:stop], stop - start)


def share(inputs: Any, processes: Processes) -> Any:
    """This process's part of inputs that all processes hold: its consecutive examples, or all where they have none."""
    examples = examples_of(inputs)
    if processes.count == 1 or examples is None:
        return inputs
    bounds = [rank * examples // processes.count for rank in (processes.rank, processes.rank + 1)]
    return take(inputs, None, *bounds).inputs


def same_last_example(one: Outputs, examples: int, other: Outputs, others: int) -> bool:
    """Whether the last example has the same outputs in two forwards, of so many examples.

    A coupling between examples (a batch's statistics, experts with a capacity, time in the leading dimension) changes
    outputs by far more than the few per cent of rounding allowed here.
    """
    first, second = one.values.detach().flatten(), other.values.detach().flatten()
    each = first.numel() // examples
    if first.numel() != each * examples or second.numel() != each * others:
        return False
    counted = torch.ones_like(first[-each:], dtype=torch.bool)
    for outputs in (one, other):
        if outputs.mask is not None:
            counted = counted & outputs.mask.flatten()[-each:]
    first, second = (torch.where(counted, x[-each:].float(), 0.0) for x in (first, second))
    return bool((first - second).norm() <= 0.05 * first.norm())


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


def _rows(inputs: Any, start: int, stop: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[start:stop]
    if isinstance(inputs, Mapping):
        return {key: _rows(value, start, stop) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_rows(value, start, stop) for value in inputs)
    return inputs
