"""How many blocks lie between each parameter and the outputs, by where tensors go in a forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerwise.common.parameter_names import canonical_name, canonical_names, first_few, unwrap
from layerwise.common.running import always_training, call, undisturbed
from layerwise.common.tensors import is_sharded
from layerwise.errors import LayerwiseError, warn
from layerwise.geometry.forward.flow import tensors_in
from layerwise.geometry.forward.made_batch import made_batch
from layerwise.geometry.forward.watched_forward import Forward

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def distances(model: nn.Module, batch: Any = None, forward: Forward | None = None) -> dict[str, int]:
    """Name of each parameter -> how many blocks there are from it to the outputs, itself in one of them counted.

    A block is an element of a list of modules with two matrices or more (a transformer's layer, a residual block), which
    runs after the one whose results it takes; where there is no such list, each module with a matrix of its own. What no
    block takes results of has distance 0, a head and the norm before it; what comes before a block, one more than that
    block: embeddings, downsampling between stages. Blocks that are given results of another stack by the side, as those of a
    decoder are an encoder's, do not come after it.

    Raises:
        LayerwiseError: a model that did not run, or that FSDP2 has sharded.
    """
    inner = unwrap(model)
    if any(is_sharded(p) for p in inner.parameters()):
        raise LayerwiseError("the model is sharded, and is followed whole: ask before fully_shard, names stay the same")
    if batch is None and forward is None:
        with suppress(Exception):  # a config without the numbers that a batch is made of
            batch = made_batch(inner)
        if batch is None:
            raise LayerwiseError("where a parameter lies is seen when the model runs: give batch=, what the model takes")
    candidates = list(_blocks(inner))
    layers = [] if candidates else [Block(name, m) for name, m in inner.named_modules() if _matrices(m, recurse=False)]
    seen = Seen(inner)
    with undisturbed(inner), torch.no_grad():
        for module in inner.modules():
            module.training = always_training(module)
        for block in [*layers, *(each for outer in candidates for each in (outer, *outer.within))]:
            seen.of_blocks |= seen.bits(block.module)
            block.module.register_forward_pre_hook(seen.before(block), with_kwargs=True)
        try:
            with seen:
                (forward or call)(inner, batch)
        except Exception as error:  # whatever a user's model raises
            raise LayerwiseError(
                f"the model did not run on the batch ({type(error).__name__}: {error}): give a batch= that it takes, or "
                "forward=lambda model, batch: ... that runs it"
            ) from error
    blocks = layers or [each for outer in candidates for each in _taken_apart(outer, seen)]
    at_rest = [canonical_name(block.name) for block in blocks if block.takes is None]
    if at_rest:
        warn(
            f"{first_few(at_rest)} took no part in the forward pass, and count as a head does: give a batch= in which they "
            "do, a forward= that runs them, or factors of your own"
        )
    found = _distances(inner, seen, blocks)
    last = min(found.values()) if layers else 0  # the head is one of them
    return {name: distance - last for name, distance in found.items()}


@dataclass(eq=False)
class Block:
    """A module that counts as one step of depth.

    Attributes:
        name: in the model.
        module: the block.
        within: blocks in a list in it, if it is a stage, as Swin's and ResNet's are.
        takes: the parameters that its inputs were made of, as bits; None where it was not run.
        beside: those of its inputs after the first that have been through blocks themselves.
        number: how many blocks ran before it.
    """

    name: str
    module: nn.Module
    within: list[Block] = field(default_factory=list)
    takes: int | None = None
    beside: int = 0
    number: int = -1


def _blocks(module: nn.Module, name: str = "", inside: bool = False) -> Iterator[Block]:
    """The outermost elements of lists that are blocks, in order; `inside` of one, those of one kind alone."""
    children = {f"{name}{step}": child for step, child in module.named_children() if _matrices(child)}
    kinds = Counter(map(type, children.values()))
    for path, child in children.items():
        several = _matrices(child) >= 2 and next(child.children(), None) is not None
        alike = not inside or len(kinds) == 1
        mixed = isinstance(module, nn.ModuleDict) and kinds[type(child)] == 1  # the parts of a model, by name
        if isinstance(module, _LISTS) and type(child) not in _LISTS and several and alike and not mixed:
            yield Block(path, child, list(_blocks(child, f"{path}.", inside=True)))
        else:
            yield from _blocks(child, f"{path}.", inside)


def _matrices(module: nn.Module, recurse: bool = True) -> int:
    return sum(p.ndim >= 2 for p in module.parameters(recurse))


class Seen(TorchDispatchMode):
    """Which parameters each tensor was made of, as bits of a number: all that share their memory alike."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = list(model.parameters())
        self.of_blocks = 0  # bits of all blocks' parameters
        self._made_of: dict[int, tuple[StorageWeakRef, int]] = {}
        self._count = 0
        for number, p in enumerate(self.parameters):
            self._note(p, 1 << number)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation; its results, and what it wrote into, are made of all that it was given."""
        out = func(*args, **(kwargs or {}))
        made_of = self.made_of(tensors_in((*args, *(kwargs or {}).values())))
        for result in tensors_in((out,)):
            self._note(result, made_of)
        return out

    def before(self, block: Block) -> Callable[..., None]:
        """A hook that notes what the block's inputs were made of, the first time that it runs."""

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            if block.takes is not None:
                return
            tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            first, *others = [self.made_of([each]) for each in tensors if each.is_floating_point()] or [0]
            block.takes, block.number, self._count = first, self._count, self._count + 1
            for bits in others:
                if bits & self.of_blocks:
                    block.beside |= bits & ~first
                else:
                    block.takes |= bits

        return note

    def made_of(self, tensors: list[Tensor]) -> int:
        """Of several together."""
        bits = 0
        for tensor in tensors:
            storage, known = self._made_of.get(_key(tensor), (None, 0))
            bits |= known if storage is not None and not storage.expired() else 0
        return bits

    def bits(self, module: nn.Module) -> int:
        """Those of a module's own parameters."""
        own = {id(p) for p in module.parameters()}
        return sum(1 << number for number, p in enumerate(self.parameters) if id(p) in own)

    def _note(self, tensor: Tensor, bits: int) -> None:
        key = _key(tensor)
        if key:
            self._made_of[key] = StorageWeakRef(tensor.untyped_storage()), bits


def _key(tensor: Tensor) -> int:
    """Of its memory; 0 where a layout of its own has none."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


def _taken_apart(block: Block, seen: Seen) -> list[Block]:
    """The blocks of a stage in its place, where they run one after the other; experts side by side stay one block."""
    inner = [each for part in block.within for each in _taken_apart(part, seen)]
    ran = sorted((each for each in inner if each.takes is not None), key=lambda each: each.number)
    one_by_one = all((b.takes or 0) & seen.bits(a.module) for a, b in pairwise(ran))
    return ran if len(ran) > 1 and len(ran) == len(inner) and one_by_one else [block]


def _distances(model: nn.Module, seen: Seen, blocks: list[Block]) -> dict[str, int]:
    """Of every parameter, from the last block that ran to the first."""
    ran = sorted((block for block in blocks if block.takes is not None), key=lambda block: block.number)
    own = {block: seen.bits(block.module) for block in ran}
    takes: dict[Block, int] = {}  # without what came in beside, there or in a block before
    for block in ran:
        beside = [other.beside for other in takes if (block.takes or 0) & own[other]]
        takes[block] = (block.takes or 0) & ~reduce(or_, beside, 0)
    far: dict[Block, int] = {}
    for block in reversed(ran):
        far[block] = 1 + max((far[other] for other in far if takes[other] & own[block]), default=0)
    of_parameter = []
    for number in range(len(seen.parameters)):
        inside = [far[block] for block in ran if own[block] >> number & 1]
        before = [far[block] + 1 for block in ran if takes[block] >> number & 1]
        of_parameter.append(max(inside or before, default=0))
    named = {id(p): name for name, p in model.named_parameters()}
    short = canonical_names(named.values())
    return {short[named[id(p)]]: found for p, found in zip(seen.parameters, of_parameter, strict=True)}
