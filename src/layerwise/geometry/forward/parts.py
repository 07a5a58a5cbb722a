"""From what was seen of a matrix to the layout of its units."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from random import Random

import torch
from torch import Size, Tensor

from layerwise.errors import LayerwiseError
from layerwise.geometry.axes import layout_of
from layerwise.geometry.forward.evidence import Axis, Site, Use
from layerwise.geometry.layout import Layout
from layerwise.geometry.split import Split

#: A projection is not in more parts than these (SD3.5's modulation: a shift, scale and gate for three branches); what looks
#: like it is a loop over heads or time steps.
MOST_PARTS = 9
BOTH_WAYS = "some of its matrices are used the other way round: their d_out and d_in are those of the first"
Factor = tuple[str, int, int]  # (what it does: "o", "i", "k"), size, stride; from the slowest to the fastest


@dataclass(frozen=True)
class Seen:
    """The layout of a weight as its products show it."""

    layout: Layout
    parts: bool  # whether they showed its parts too
    note: str = ""  # what is not certain, "" if nothing


def layout_seen(
    uses: Sequence[Use], sites: Sequence[tuple[Site, Tensor]], shape: Size, apart: Set[int] = frozenset()
) -> Seen | None:
    """Which way round a weight is, which stacks and which parts it has. None where its products do not say.

    What stands in a dimension of its own and meets a matrix of another stack each is a matrix each: experts that all see
    every token. (`apart` has the strides of such dimensions.)
    """
    products = [use for use in uses if use.kind == "product"]
    factors = _factors(products, shape)
    if factors is None:
        return None
    stacked = [("k" if side == "o" and step in apart else side, size, step) for side, size, step in factors]
    if len(factors) == len(shape) > 2 and any(side == "o" for side, _, _ in stacked):
        factors = stacked
    note = BOTH_WAYS if len({tuple(axis.side for axis in _by_stride(use)) for use in products}) > 1 else ""
    try:
        whole = layout_of(_pattern(factors, shape))
    except LayerwiseError:  # rows or columns in several pieces of one dimension
        return None
    classes = _row_classes(factors, sites)
    if classes is None:
        return Seen(whole, False, note)
    split = split_of(*classes)
    return Seen(replace(whole, split=split), split is not None or len(set(classes[0])) == 1, note)


def _factors(uses: Sequence[Use], shape: Size) -> list[Factor] | None:
    """The dimensions of a parameter, cut where a product cut them, with what each does."""
    axes = _common_axes(uses, shape)
    if axes is None:
        return None
    sliced = len({use.offset for use in uses}) > 1
    factors: list[Factor] = []
    stride = prod(shape)
    for size in shape:
        stride //= max(size, 1)
        factors += _cut(size, stride, axes, sliced)
    given = {side for side, _, _ in factors if side}
    for index, (side, size, step) in enumerate(factors):
        if side or size > 1:
            continue
        missing = next((s for s in "oi" if s not in given), "k")
        factors[index] = (missing, size, step)
        given.add(missing)
    factors = [(side or "k", size, step) for side, size, step in factors]
    return factors if {"o", "i"} <= {side for side, _, _ in factors} else None


def _by_stride(use: Use) -> tuple[Axis, ...]:
    return tuple(sorted(use.axes, key=lambda axis: axis.stride))


def _common_axes(uses: Sequence[Use], shape: Size) -> tuple[Axis, ...] | None:
    """The axes that all products agree on.

    Where slices of rows differ in size, rows run on to the end of their dimension. Where matrices stand side by side the
    one way round and the other, as in a bank of up and down projections, the first says which is meant.
    """
    kinds = list(dict.fromkeys(map(_by_stride, uses)))
    if len(kinds) <= 1:
        return kinds[0] if kinds else None
    if len({tuple((axis.side, axis.stride) for axis in axes) for axes in kinds}) == 1:
        largest = max(kinds, key=lambda axes: prod(axis.size for axis in axes))
        ends = [prod(shape[dim:]) for dim in range(len(shape))]
        return tuple(
            replace(axis, size=min(end for end in ends if end >= axis.stride * axis.size) // axis.stride)
            if axis.side == "out"
            else axis
            for axis in largest
        )
    alike = len({tuple((axis.size, axis.stride) for axis in axes) for axes in kinds}) == 1
    return kinds[0] if alike and len({use.offset for use in uses}) == len(uses) else None


def _cut(size: int, stride: int, axes: Sequence[Axis], sliced: bool) -> list[Factor]:
    """One dimension of the parameter as factors, slowest first; what no product touched has no side yet.

    Where one product saw a part of a dimension, the rest of it is taken for more of the same.
    """
    end = stride * size
    marks = {stride, end}
    for axis in axes:
        marks |= {m for m in (axis.stride, axis.stride * axis.size) if stride < m < end}
    ordered = sorted(marks)
    pieces: list[Factor] = []
    for low, high in pairwise(ordered):
        if high % low:  # rows that fill no whole number of blocks: one run of rows
            return [(_side(axes, stride), size, stride)]
        pieces.append((_side(axes, low), high // low, low))
    if len(pieces) > 1 and not sliced and not all(side for side, _, _ in pieces):
        return [(_side(axes, stride), size, stride)]
    return pieces[::-1] if pieces else [("", size, stride)]


def _side(axes: Sequence[Axis], stride: int) -> str:
    for axis in sorted(axes, key=lambda axis: -axis.stride):
        if axis.stride <= stride < axis.stride * axis.size and stride % axis.stride == 0:
            return {"out": "o", "in": "i", "stack": "k"}[axis.side]
    return ""


def _pattern(factors: Sequence[Factor], shape: Size) -> str:
    """Factors in the notation of `layout_of`: a dimension that was cut is in brackets, with the sizes of its stacks."""
    words = []
    remaining = list(factors)
    for size in shape:
        own = [remaining.pop(0)]
        while prod(factor[1] for factor in own) < size and remaining:
            own.append(remaining.pop(0))
        names = [str(f[1]) if f[0] == "k" and len(own) > 1 else f[0] for f in own]
        words.append(names[0] if len(names) == 1 else f"({' '.join(names)})")
    return " ".join(words)


def channels_split(channels: int, stride: int, sites: Sequence[tuple[Site, Tensor]]) -> Split | None:
    """The parts of a convolution's output channels where most are known to be queries, keys, values or gates."""
    classes = _row_classes([("o", channels, stride)], sites)
    return split_of(*classes) if classes is not None and 2 * sum(map(bool, classes[1])) > len(classes[1]) else None


Classes = tuple[tuple[int, ...], tuple[str, ...]]  # the class of each row, the name of each class


def _row_classes(factors: Sequence[Factor], sites: Sequence[tuple[Site, Tensor]]) -> Classes | None:
    """Rows whose results went to other places are of another class: those of most matrices of a stack."""
    if not any(site.known for site, _ in sites):
        return None
    rows = _addresses(factors, "o")
    classes = [_classes(rows + start, sites) for start in _addresses(factors, "k").tolist()[:64]]
    seen = Counter(found for found in classes if found is not None)
    return seen.most_common(1)[0][0] if seen else None


def _addresses(factors: Sequence[Factor], side: str) -> Tensor:
    result = torch.zeros(1, dtype=torch.int64, device="cpu")
    for _, size, stride in (factor for factor in factors if factor[0] == side):
        result = (result.unsqueeze(1) + torch.arange(size, device="cpu") * stride).flatten()
    return result


def _classes(rows: Tensor, sites: Sequence[tuple[Site, Tensor]]) -> Classes | None:
    """The classes of the rows of one matrix; None where the results of some went nowhere that was seen."""
    went = torch.zeros(len(rows), dtype=torch.int64, device="cpu")
    called: dict[int, dict[str, None]] = defaultdict(dict)
    for number, (site, addresses) in enumerate(sites):
        here = torch.isin(rows, addresses)
        went += here * Random(number).getrandbits(54)  # sums of different sites differ
        for row in here.nonzero()[:1].flatten().tolist() if site.part else ():
            called[row][site.part] = None
    if not bool(went.all()):
        return None
    _, inverse = torch.unique(went, return_inverse=True)
    order: dict[int, int] = {}
    kinds = tuple(order.setdefault(kind, len(order)) for kind in _loops_joined(inverse.tolist()))
    first = {kind: next(iter(called[row]), "") for row, kind in reversed(list(enumerate(kinds))) if row in called}
    return kinds, tuple(first.get(kind, "") for kind in range(len(order)))


def _loops_joined(kinds: Sequence[int]) -> list[int]:
    """Neighbouring rows that are each alone in their class in one: a loop over the scores of experts, or over levels."""
    count = Counter(kinds)
    joined: list[int] = []
    for row, kind in enumerate(kinds):
        follows = row > 0 and count[kind] == count[kinds[row - 1]] == 1
        joined.append(joined[-1] if follows else kind)
    return joined


def split_of(kinds: Sequence[int], names: Sequence[str]) -> Split | None:
    """Rows of given classes as a `Split`: the shortest pattern that repeats. None for one class, or no such pattern."""
    count = len(set(kinds))
    if not 1 < count <= MOST_PARTS:
        return None
    sequence = torch.tensor(kinds, device="cpu")
    period = next(
        p for p in range(1, len(kinds) + 1) if len(kinds) % p == 0 and bool((sequence.view(-1, p) == sequence[:p]).all())
    )
    changes = [0, *(1 + (sequence[1:period] != sequence[: period - 1]).nonzero().flatten()).tolist(), period]
    pieces = len(changes) - 1
    if pieces != count:  # a part in several pieces of a block
        even = len({end - start for start, end in pairwise(changes)}) == 1
        return Split.equal(*map(str, range(pieces))) if even and len(kinds) == period and pieces <= MOST_PARTS else None
    known = {*names} <= set("qkv") or {*names} == {"gate", "up"}
    called = list(names) if known and len({*names}) == count else [str(i) for i in range(count)]
    sizes = {called[int(sequence[start])]: end - start for start, end in pairwise(changes)}
    return Split.of_sizes(sizes, blocks=len(kinds) // period)
