"""What is known in the middle of a forward pass: where every tensor comes from, and what was seen so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from layerwise.geometry.forward.addresses import AddressSpace, constant_along, first_address, small
from layerwise.geometry.forward.evidence import Evidence, Kind
from layerwise.geometry.module_kinds import is_linear, lora_factors


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from. A tensor without one is an input, or was made from inputs alone."""

    weights: tuple[Tensor, ...] = ()  # addresses of the parameters it holds, entry by entry, each in the tensor's shape
    constant: bool = False  # whether it was made from parameters and buffers alone
    rows: tuple[Tensor, ...] = ()  # addresses of the rows of weights that made its entries; several where they were added up
    #: numbers of the parameters whose results, untransformed by another parameter, are in it; of a constant those of which
    #: it was made in ways that are not followed
    results_of: frozenset[int] = frozenset()
    bent: bool = False  # whether a nonlinear function was applied since the rows made it
    pooled: bool = False  # whether entries were put together into one since the rows made it: a mean, a norm, a loss
    scaled: bool = False  # whether a learned vector multiplied it
    normalised: bool = False  # whether it was divided by, or multiplied with, what its own entries were pooled to
    counts: bool = False  # whether made of numbers that count up, whatever the input: of positions, or relative ones


CONSTANT = Origin(constant=True)
POSITIONS = Origin(constant=True, counts=True)
#: Sums of more results than these keep the last ones: a residual stream, whose rows nobody asks for.
MOST_ROWS = 4
_NO_ROW = torch.tensor(-1, device="cpu")


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
        # No rows of a weight that is there: halves of a rotary embedding, joined in a sum.
        rows += [a for a in fit if a is not None and not any(torch.equal(small(b), small(a)) for b in rows)]
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


def is_of_features(weight: Tensor, activations: Iterable[Origin]) -> bool:
    """Whether a wide weight is added to rows that differ along all of its dimensions: a bias, and no table of positions."""
    wide = [dim for dim in range(-weight.ndim, 0) if small(weight).shape[dim] > 1]
    rows = [r for origin in activations for r in origin.rows if len(wide) > 1 and r.ndim >= weight.ndim]
    return any(not any(constant_along(r, [dim]) for dim in wide) for r in rows)


@dataclass(frozen=True)
class Operation:
    """One call of an operation of torch."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: list[Tensor]  # all that were given, those in lists too
    results: list[Tensor]
    number: int  # how many there were before it

    @property
    def name(self) -> str:
        """`add` for `aten.add.Tensor` and for `aten.add_.Tensor`."""
        return name_of(self.func)

    def argument(self, name: str) -> Any:
        """An argument by its name in the operation's schema, None where it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        position, default = _declared(self.func).get(name, (len(self.args), None))
        return self.args[position] if position < len(self.args) else default


@cache
def name_of(func: Any) -> str:
    """The name of an operation, the same for all its overloads and in place."""
    return str(getattr(func, "overloadpacket", func).__name__).removesuffix("_")


@cache
def _declared(func: Any) -> dict[str, tuple[int, Any]]:
    """The arguments in the schema of an operation: name -> position, default."""
    return {each.name: (i, each.default_value) for i, each in enumerate(func._schema.arguments)}


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values and in lists among them. (torch's own walk takes ten times as long.)"""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found


@dataclass
class Written:
    """What was written into a storage, part by part."""

    storage: StorageWeakRef
    rows: list[Tensor]  # for each entry of it, the addresses of the rows that made it
    results_of: frozenset[int] = frozenset()  # numbers of the parameters whose results are in it


class Flow:
    """The origins of the tensors of one model, and the evidence on its parameters.

    `space` has their addresses, by the names of `model.named_parameters()`.
    """

    def __init__(self, model: nn.Module, space: AddressSpace) -> None:
        self.evidence = Evidence(space)
        self._model = model
        self._numbers: dict[int, int] = {}
        self._constants = {id(b): POSITIONS if _counts(b) else CONSTANT for b in model.buffers()}
        self._origins = WeakTensorKeyDictionary()
        self._written: dict[int, Written] = {}
        self._look_up_names()
        layers = [m for m in model.modules() if is_linear(m) or isinstance(m, nn.MultiheadAttention)]
        #: numbers of the parameters that are factors of low-rank adapters, and of those that belong to linear layers
        self.factors = frozenset(self._numbers[key] for key in lora_factors(model))
        self.linear = frozenset(self._numbers[id(p)] for m in layers for p in m.parameters(recurse=False))

    def origin(self, tensor: Tensor) -> Origin | None:
        """Where a tensor comes from, None for inputs and what was made of inputs alone."""
        written = self._written_into(tensor) if self._written else None
        known = self._origins.get(tensor) or (None if written else self._given(tensor))
        if written is None:
            return known
        results_of = written.results_of - self.evidence.transformed
        if known is not None and known.rows:
            return replace(known, results_of=known.results_of | results_of)
        return Origin(rows=tuple(_as(tensor, rows).clone() for rows in written.rows), results_of=results_of)

    def origins(self, tensors: Iterable[Tensor]) -> list[Origin]:
        """The origin of each, an empty one where there is none."""
        return [self.origin(tensor) or Origin() for tensor in tensors]

    def used(self, origins: Iterable[Origin], kind: Kind, **seen: Any) -> None:
        """One use of every weight that tensors of these origins hold; `seen`: fields of `Use`."""
        for origin in origins:
            for weight in origin.weights:
                self.evidence.used(weight, kind, **seen)

    def numbers(self, origin: Origin) -> frozenset[int]:
        """The numbers of the parameters whose entries a tensor holds."""
        return frozenset(self.evidence.space.owner(first_address(view)) for view in origin.weights)

    def has_flat(self, origin: Origin) -> bool:
        """Whether parameters of two dimensions are among those whose entries a tensor holds."""
        return any(len(self.evidence.space.shapes[number]) == 2 for number in self.numbers(origin))

    def matrices(self, origin: Origin) -> frozenset[int]:
        """Those of the parameters that may be weights of a layer."""
        shapes = self.evidence.space.shapes
        return frozenset(n for n in self.numbers(origin) if n in self.linear or sum(size > 1 for size in shapes[n]) > 1)

    def transformed_by(self, made: Origin, source: Origin) -> None:
        """A layer whose weight was made in ways that are not followed took results of others."""
        if made.results_of and not source.constant:
            self.evidence.transformed |= source.results_of - made.results_of

    def came_from(self, tensor: Tensor, origin: Origin) -> None:
        """Remember the origin of a tensor."""
        self._origins[tensor] = origin

    def made(self, op: Operation, origin: Origin) -> None:
        """Remember where all results of an operation come from."""
        for result in op.results:
            self.came_from(result, origin)

    def wrote(self, tensor: Tensor) -> None:
        """A tensor that is a part of a larger one was written in place: so was the larger one."""
        origin = self._origins.get(tensor)
        if origin is None or origin.constant:
            return
        storage = tensor.untyped_storage()
        known = self._written_into(tensor)
        if known is None:
            known = self._written[storage._cdata] = Written(StorageWeakRef(storage), [])
        known.results_of |= origin.results_of
        entries = storage.nbytes() // tensor.element_size()
        known.rows += [torch.full((entries,), -1, device="cpu") for _ in origin.rows[len(known.rows) :]]
        for kept, rows in zip_longest(known.rows, origin.rows, fillvalue=_NO_ROW):
            _as(tensor, kept).copy_(rows)

    def _written_into(self, tensor: Tensor) -> Written | None:
        if tensor.layout is not torch.strided:
            return None
        known = self._written.get(tensor.untyped_storage()._cdata)
        return None if known is None or known.storage.expired() else known

    def _given(self, tensor: Tensor) -> Origin | None:
        """The origin of a parameter or a buffer."""
        if id(tensor) in self._constants:
            return self._constants[id(tensor)]
        if not isinstance(tensor, nn.Parameter):
            return None
        if id(tensor) not in self._numbers:
            self._look_up_names()  # FSDP2 puts others in their place for the time of the forward pass
        number = self._numbers.get(id(tensor))
        if number is None:
            return None
        addresses = self.evidence.space.views[number]
        return Origin((addresses,) if addresses.shape == tensor.shape else (), constant=True)

    def _look_up_names(self) -> None:
        numbers = self.evidence.space.numbers
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if name in numbers:
                self._numbers.setdefault(id(parameter), numbers[name])


def _as(tensor: Tensor, flat: Tensor) -> Tensor:
    """The entries of a storage that a tensor holds, in its shape."""
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _counts(buffer: Tensor) -> bool:
    """Whether a buffer holds numbers of positions. Nothing says so of one without values (meta and fake tensors)."""
    if buffer.dtype not in (torch.int32, torch.int64) or buffer.is_meta or not buffer.ndim or buffer.shape[-1] < 2:
        return False
    try:
        return bool((buffer.diff(dim=-1) == 1).all())
    except RuntimeError:
        return False
