"""What is known in the middle of a forward pass: where every tensor comes from, and what was seen so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from layerwise.geometry.forward.addresses import AddressSpace, first_address
from layerwise.geometry.forward.evidence import Evidence
from layerwise.geometry.forward.origins import CONSTANT, POSITIONS, Origin
from layerwise.geometry.module_kinds import is_linear, lora_factors


@dataclass(frozen=True)
class Operation:
    """One call of an operation of torch.

    Attributes:
        func: the operation.
        args: its arguments.
        kwargs: those given by name.
        tensors: all tensors given, those in lists too.
        results: the tensors that came out.
        number: how many there were before it.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: list[Tensor]
    results: list[Tensor]
    number: int

    @property
    def name(self) -> str:
        """`add` for `aten.add.Tensor` and for `aten.add_.Tensor`."""
        return name_of(self.func)

    @property
    def writes_into_a_part(self) -> bool:
        """Whether it writes in place, into a view of another tensor."""
        return bool(self.args) and self.results[0] is self.args[0] and self.results[0]._is_view()

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
    """What was written into a storage, part by part.

    Attributes:
        storage: the storage, without keeping it alive.
        rows: for each entry of it, the address of the row that made it.
        results_of: numbers of the parameters whose results are in it.
    """

    storage: StorageWeakRef
    rows: Tensor
    results_of: frozenset[int] = frozenset()


class Flow:
    """The origins of the tensors of one model, and the evidence on its parameters.

    Args:
        model: whose parameters are followed.
        space: their addresses, by the names of `model.named_parameters()`.

    Attributes:
        evidence: what was seen of them.
        factors: numbers of those that are factors of low-rank adapters.
        linear: numbers of those that belong to linear layers.
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
        return Origin(rows=(_as(tensor, written.rows).clone(),), results_of=results_of)

    def numbers(self, origin: Origin) -> frozenset[int]:
        """The numbers of the parameters whose entries a tensor holds."""
        return frozenset(self.evidence.space.owner(first_address(view)) for view in origin.weights)

    def matrices(self, origin: Origin) -> frozenset[int]:
        """Those of the parameters that may be weights of a layer."""
        return frozenset(n for n in self.numbers(origin) if len(self.evidence.space.shapes[n]) > 1)

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
            rows = torch.full((storage.nbytes() // tensor.element_size(),), -1)
            known = self._written[storage._cdata] = Written(StorageWeakRef(storage), rows)
        known.results_of |= origin.results_of
        for rows in origin.rows[:1]:
            _as(tensor, known.rows).copy_(rows)

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
        addresses = self.evidence.space.at(number)
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
