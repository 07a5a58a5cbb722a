"""What a forward pass shows of each parameter: how it was used, where the results of its rows went, what came out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.geometry.forward.addresses import AddressSpace, first_address, small, written_out

Kind = Literal["product", "convolution", "lookup", "table", "gain", "bias", "norm", "other"]
Side = Literal["out", "in", "stack"]
#: Sites kept of a parameter; a loop over time steps has one a step, and the first ones tell.
MOST_SITES = 64


@dataclass(frozen=True)
class Axis:
    """One dimension of a weight in a product: `size` entries, `stride` addresses apart, that map out, in, or neither."""

    side: Side
    size: int
    stride: int


@dataclass(frozen=True)
class Use:
    """One use of a parameter."""

    kind: Kind
    offset: int = 0  # where in the parameter the part that was used begins
    axes: tuple[Axis, ...] = ()  # of a product, the dimensions of that part
    shape: tuple[int, ...] = ()  # in which it was used
    groups: int = 1  # of a convolution, as the next two
    transposed: bool = False
    kernel: tuple[int, ...] = ()
    counted: bool = False  # of a lookup: whether rows were asked for by position (0, 1, 2, ...), not by the input


@dataclass(frozen=True)
class Site:
    """Where results of rows went: an operation's number, and which operand of it."""

    operation: int
    operand: int
    part: str = ""  # what such rows are called, "" if nothing in particular
    known: bool = True  # whether it is understood what the operation does with them


@dataclass
class Evidence:
    """All that was seen in the forward passes of one model, by the numbers of its parameters."""

    space: AddressSpace
    uses: dict[int, list[Use]] = field(default_factory=lambda: defaultdict(list))
    #: with the addresses of the rows whose results went there
    sites: dict[int, list[tuple[Site, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    transformed: set[int] = field(default_factory=set)  # those whose results another parameter transformed afterwards
    reached: set[int] = field(default_factory=set)  # those whose results reached an output of the model
    #: strides along which the results of rows went to a matrix of a stack each
    apart: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    guessed: set[int] = field(default_factory=set)  # those multiplied with one another where nothing says which one maps
    of_unseen: str = ""  # the note on parameters that took no part
    #: Where addresses lie in memory -> the addresses, kept so that no others come to lie there, and what they say.
    _entries: dict[tuple[Any, ...], tuple[Tensor, dict[int, Tensor]]] = field(default_factory=dict)

    def understood(self, number: int) -> bool:
        """Whether it was seen what a parameter does, or where its results go."""
        known = any(use.kind != "other" for use in self.uses.get(number, ()))
        return known or number in self.reached or number in self.transformed

    def product(self, view: Tensor, sides: Sequence[Side]) -> None:
        """A weight took part in a matrix product; `sides` says what each dimension of its view does."""
        steps = [_steps(view, dim) for dim in range(view.ndim)]
        axes = tuple(
            Axis(side, size, stride)
            for side, own in zip(sides, steps, strict=True)
            for size, stride in own
            if size > 1 and stride
        )
        # A gain, expanded to the shape of a matrix: but rows that are repeated are still rows.
        spread = any(
            side != "stack" and max(own) > (1, 0) and not any(stride for _, stride in own)
            for side, own in zip(sides, steps, strict=True)
        )
        self.used(view, "gain" if spread else "product", axes=() if spread else axes)

    def used(self, view: Tensor, kind: Kind, **seen: Any) -> None:
        """One use of a weight, and what was seen in it: fields of `Use`."""
        if view.numel():
            first = first_address(view)
            owner = self.space.owner(first)
            use = Use(kind, first - self.space.starts[owner], shape=tuple(view.shape), **seen)
            if use not in self.uses[owner]:
                self.uses[owner].append(use)

    def went(self, rows: Iterable[Tensor], site: Site) -> None:
        """The results of these rows went to a site."""
        for addresses in map(small, rows):
            storage = addresses.untyped_storage()._cdata
            key = (storage, addresses.storage_offset(), addresses.shape, addresses.stride())
            if key not in self._entries:  # a residual stream goes to every layer
                self._entries[key] = addresses, self.space.by_owner(addresses)
            for owner, entries in self._entries[key][1].items():
                self._add(owner, site, entries)

    def went_apart(self, rows: Iterable[Tensor]) -> None:
        """The results of these rows went to a matrix of a stack each, by their first dimension."""
        for first, second in ((some[0], some[1]) for some in map(small, rows) if len(some) > 1):
            steps = (second - first)[first >= 0].unique()
            if len(steps) == 1:
                self.apart[self.space.owner(int(first.max()))].add(int(steps[0]))

    def _add(self, owner: int, site: Site, rows: Tensor) -> None:
        sites = self.sites[owner]
        last = sites[-1] if sites else None
        if last is not None and (last[0].operation, last[0].operand) == (site.operation, site.operand):
            sites[-1] = last[0], torch.cat([last[1], rows])
        elif len(sites) < MOST_SITES:
            sites.append((site, rows))


def _steps(view: Tensor, dim: int) -> list[tuple[int, int]]:
    """A dimension as dimensions of even steps, `(size, stride)`: two where heads and their entries were flattened into one.

    Raises:
        ValueError: it is no such dimension.
    """
    if view.is_meta:
        return [(view.shape[dim], view.stride(dim))]
    addresses = written_out(view)
    line = addresses[tuple(slice(None) if d == dim else 0 for d in range(view.ndim))]
    along = (line - line[0]).view([-1 if d == dim else 1 for d in range(view.ndim)])
    if bool((addresses != addresses.narrow(dim, 0, 1) + along).any()):
        raise ValueError("the entries of other rows are spaced in another way")
    return _even_steps(line.sort().values - line.min())  # rows in another order are the same rows


def _even_steps(line: Tensor) -> list[tuple[int, int]]:
    if len(line) < 2:
        return [(len(line), 0)]
    stride = int(line[1])
    uneven = (line.diff() != stride).nonzero()
    size = int(uneven[0]) + 1 if len(uneven) else len(line)
    if len(line) % size or bool((line.view(-1, size) != line[::size, None] + line[:size]).any()):
        raise ValueError("the entries are not evenly spaced")
    return [(size, stride)] if size == len(line) else [*_even_steps(line[::size]), (size, stride)]
