"""What is known of a tensor in a forward pass: which parameters it was made from, and how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Size, Tensor

from layerwise.geometry.forward.addresses import constant_along, small


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from. A tensor without one is an input, or was made from inputs alone.

    Attributes:
        weights: addresses of the parameters it holds, entry by entry, each in the tensor's shape.
        constant: whether it was made from parameters and buffers alone.
        rows: addresses of the rows of weights that made its entries; several where results were added up.
        results_of: numbers of the parameters whose results, untransformed by another parameter, are in it; of a constant
            those of which it was made in ways that are not followed.
        bent: whether a nonlinear function was applied since the rows made it.
        pooled: whether entries were put together into one since the rows made it: a mean, a norm, a loss.
        scaled: whether a learned vector multiplied it.
        normalised: whether it was divided by, or multiplied with, what its own entries were pooled to.
        counts: whether it was made of numbers that count up, whatever the input is: numbers of positions, or relative ones.
    """

    weights: tuple[Tensor, ...] = ()
    constant: bool = False
    rows: tuple[Tensor, ...] = ()
    results_of: frozenset[int] = frozenset()
    bent: bool = False
    pooled: bool = False
    scaled: bool = False
    normalised: bool = False
    counts: bool = False


CONSTANT = Origin(constant=True)
POSITIONS = Origin(constant=True, counts=True)
#: Sums of more results than these keep the last ones: a residual stream, whose rows nobody asks for.
MOST_ROWS = 4


def expanded(addresses: Tensor, shape: Size) -> Tensor | None:
    """Addresses broadcast to a shape, None where that cannot be."""
    if addresses.shape == shape:
        return addresses
    try:
        return addresses.expand(shape)
    except RuntimeError:
        return None


def joined(origins: Iterable[Origin], shape: Size, transformed: set[int]) -> Origin:
    """The origin of what an operation makes of activations entry by entry."""
    given = list(origins)
    rows: list[Tensor] = []
    for origin in given:
        fit = [expanded(addresses, shape) for addresses in origin.rows]
        rows += [addresses for addresses in fit if addresses is not None and not _known(addresses, rows)]
    return Origin(
        rows=tuple(rows[-MOST_ROWS:]),
        results_of=results_in(given) - transformed,
        bent=any(origin.bent for origin in given) and bool(rows),
        pooled=all(origin.pooled for origin in given),
        scaled=all(origin.scaled for origin in given),
        normalised=all(origin.normalised for origin in given),
    )


def results_in(origins: Iterable[Origin]) -> frozenset[int]:
    """The numbers of the parameters whose results are in any of them."""
    return frozenset[int]().union(*(origin.results_of for origin in origins))


def replayed(origin: Origin, weights: Iterable[Tensor], rows: Iterable[Tensor]) -> Origin:
    """The same origin after an operation that moves entries about."""
    return replace(origin, weights=tuple(weights), rows=tuple(rows))


def is_of_features(weight: Tensor, activations: Iterable[Origin]) -> bool:
    """Whether a wide weight is added to rows that differ along all of its dimensions: a bias, and no table of positions."""
    wide = [dim for dim in range(-weight.ndim, 0) if small(weight).shape[dim] > 1]
    rows = [r for origin in activations for r in origin.rows if len(wide) > 1 and r.ndim >= weight.ndim]
    return any(not any(constant_along(r, [dim]) for dim in wide) for r in rows)


def _known(addresses: Tensor, among: list[Tensor]) -> bool:
    """Whether rows of the same weight are among these: halves of a rotary embedding, joined in a sum."""
    first = small(addresses)
    return any(torch.equal(small(other), first) for other in among)
