"""Addresses: every entry of every parameter has a number, and whatever happens to a tensor happens to its numbers.

The parameters of a model lie one after the other in one address space. The addresses of a parameter are a tensor of its
shape on the meta device, so that a view of the parameter is a view of its addresses: sizes, strides and offset say
which entry is where, and nothing is stored. The addresses of *activations* are integers in memory: each entry holds the
address of the first entry of the row (of a weight) that made it, -1 where there is none. They vary along the features
alone, so they are expanded along all other dimensions and as small as a bias.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Size, Tensor

#: Above this many entries a tensor of addresses is not written out.
LARGEST = 2**25


class AddressSpace:
    """The addresses of a model's parameters, given by name -> shape, in any order.

    By a parameter's number, `starts` has the address of its first entry, and `views` its addresses, views of the space.
    """

    def __init__(self, shapes: Mapping[str, Size]) -> None:
        self.numbers = {name: number for number, name in enumerate(shapes)}
        self.shapes = list(shapes.values())
        self.starts = [0, *accumulate(shape.numel() for shape in self.shapes)]
        space = torch.empty(self.starts[-1], dtype=torch.uint8, device="meta")
        self.views = [
            space[start : start + shape.numel()].view(shape) for start, shape in zip(self.starts, self.shapes, strict=False)
        ]

    def owner(self, address: int) -> int:
        """The number of the parameter that an address lies in."""
        return bisect_right(self.starts, address) - 1

    def by_owner(self, addresses: Tensor) -> dict[int, Tensor]:
        """Number of each parameter that addresses of activations lie in -> which of its entries they are."""
        present = torch.unique(addresses)  # in ascending order
        entries = {}
        while len(present):
            first, last = int(present[0]), int(present[-1])
            owner = self.owner(first)  # -1 for what is no address
            end = self.starts[owner + 1]
            count = int(torch.searchsorted(present, end)) if last >= end else len(present)
            if first >= 0:
                entries[owner] = present[:count] - self.starts[owner]
            present = present[count:]
        return entries


def first_address(addresses: Tensor) -> int:
    """The address of the entry that comes first in its parameter."""
    return int(addresses.storage_offset()) if addresses.is_meta else int(addresses.min())


def first_of_rows(addresses: Tensor, inner: int) -> Tensor:
    """The address of the first entry of each row of a weight, in memory; `inner` is the dimension along rows."""
    if addresses.is_meta:
        return written_out(addresses.narrow(inner, 0, 1))
    return addresses.amin(inner, keepdim=True)


def written_out(addresses: Tensor) -> Tensor:
    """Addresses as integers in memory, of a view of the space or of addresses that are so already."""
    if addresses.device.type != "meta":
        return addresses
    if addresses.numel() > LARGEST:
        raise ValueError(f"{addresses.numel()} addresses are too many to write out")
    result = torch.full((1,) * addresses.ndim, first_address(addresses), dtype=torch.int64, device="cpu")
    for dim, (size, stride) in enumerate(zip(addresses.shape, addresses.stride(), strict=True)):
        steps = [1] * addresses.ndim
        steps[dim] = size
        if stride and size > 1:
            result = result + torch.arange(0, size * stride, stride, device="cpu").view(steps)
    return result.expand(addresses.shape)


def small(addresses: Tensor) -> Tensor:
    """The same addresses without the repetitions of expanded dimensions, which get size one."""
    for dim, stride in enumerate(addresses.stride()):
        if stride == 0 and addresses.shape[dim] > 1:
            addresses = addresses.narrow(dim, 0, 1)
    return addresses


def constant_along(addresses: Tensor, dims: Sequence[int]) -> bool:
    """Whether all entries along these dimensions have the same address."""
    some = small(addresses)
    return all(
        some.shape[dim] <= 1 or torch.equal(some, some.narrow(dim, 0, 1).expand_as(some))
        for dim in (d % addresses.ndim for d in dims)
    )


def first_along(addresses: Tensor, dim: int, size: int) -> Tensor:
    """The address at the beginning of a dimension, repeated to `size` along it."""
    first = addresses.narrow(dim, 0, 1)
    shape = list(first.shape)
    shape[dim] = size
    return first.expand(shape)
