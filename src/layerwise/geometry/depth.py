"""How many blocks lie between each parameter and the outputs, by where tensors go in a forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce, wraps
from itertools import pairwise
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise.common.parameter_names import canonical_name, canonical_names, first_few, unwrap
from layerwise.common.running import Kept, call
from layerwise.common.tensors import is_sharded
from layerwise.errors import LayerwiseError, warn
from layerwise.geometry.forward.flow import tensors_in
from layerwise.geometry.forward.made_batch import made_batch
from layerwise.geometry.forward.watched_forward import Forward, needs_gradients, one_pass, output_tensors, run_operation

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def distances(model: nn.Module, batch: Any = None, forward: Forward | None = None) -> dict[str, int]:
    """Name of each parameter -> how many blocks there are from it to the outputs, itself in one of them counted.

    A block is an element of a list of modules with two matrices or more (a transformer's layer, a residual block), which
    runs after the one whose results it takes; where there is no such list, each module with a matrix of its own. What no
    block takes results of has distance 0, a head and the norm before it; what comes before a block, one more than that
    block: embeddings, downsampling between stages. Blocks that are given results of another stack by the side, as those of a
    decoder are an encoder's, do not come after it.

    Raises:
        LayerwiseError: a model that did not run, whose blocks run by other methods than forward, or that FSDP2 has sharded.
    """
    inner = unwrap(model)
    if any(is_sharded(p) for p in inner.parameters()):
        raise LayerwiseError("the model is sharded, and is followed whole: ask before fully_shard, names stay the same")
    candidates = list(_blocks(inner))
    layers = [] if candidates else [Block(name, m) for name, m in inner.named_modules() if _matrices(m, recurse=False)]
    seen = _run(inner, batch, forward, [each for outer in (*layers, *candidates) for each in outer.with_all_within()])
    stages = {type(outer.module) for outer in candidates if _taken_apart(outer) != [outer]}
    blocks = layers or [each for outer in candidates for each in _taken_apart(outer, type(outer.module) in stages)]
    _tell_of_rest(inner, seen, blocks)
    far = _far(_in_order(blocks))
    found = [_of_parameter(1 << number, far) for number in range(len(seen.parameters))]
    comes_after = any(not distance and seen.used >> number & 1 for number, distance in enumerate(found))
    head = 1 if layers or (not comes_after and _end_in_heads(far)) else 0  # it is one of the blocks
    named = {id(p): name for name, p in inner.named_parameters()}
    short = canonical_names(named.values())
    return {short[named[id(p)]]: max(0, n - head) for p, n in zip(seen.parameters, found, strict=True)}


def _run(model: nn.Module, batch: Any, forward: Forward | None, blocks: list[Block]) -> Seen:
    """What is seen of a model, and of what its blocks are given, while it runs."""
    is_made = batch is None and forward is None
    if is_made:
        batch = _made(model)
    try:
        with one_pass(model, training=False) as kept:
            seen = Seen(model, kept)
            for block in blocks:
                seen.follow(block)
            try:
                with seen:
                    (forward or call)(model, batch)
            except RuntimeError as error:
                if not needs_gradients(error):
                    raise
                with seen, torch.enable_grad():
                    (forward or call)(model, batch)
    except Exception as error:  # whatever a user's model raises
        whose = "a batch made for it" if is_made else "the batch"
        first = (str(error).splitlines() or [""])[0][:200]
        raise LayerwiseError(
            f"the model did not run on {whose} ({type(error).__name__}: {first}): give a batch= that it takes, or "
            "forward=lambda model, batch: ... that runs it"
        ) from error
    return seen


def _made(model: nn.Module) -> Any:
    """A batch for a model of transformers, inside of peft's or not."""
    of_transformers: Any = getattr(model, "get_base_model", lambda: model)
    batch = None
    with suppress(Exception):  # a config without the numbers that a batch is made of
        batch = made_batch(of_transformers())
    if batch is None:
        raise LayerwiseError("where a parameter lies is seen when the model runs: give batch=, what the model takes")
    return batch


@dataclass(eq=False)
class Block:
    """A module that counts as one step of depth.

    Attributes:
        name: in the model.
        module: the block.
        list_of: the list that it is in, if any.
        within: blocks in a list in it, if it is a stage, as Swin's and ResNet's are.
        own: its parameters, as bits.
        siblings: those of all others in its list.
        takes: the parameters that its inputs were made of, as bits.
        beside: those of inputs by the side that have been through blocks themselves.
        number: how many blocks ran before it; None where it was not run.
    """

    name: str
    module: nn.Module
    list_of: nn.Module | None = None
    within: list[Block] = field(default_factory=list)
    own: int = 0
    siblings: int = 0
    takes: int = 0
    beside: int = 0
    number: int | None = None

    def with_all_within(self) -> Iterator[Block]:
        """It, and the blocks in it and in those."""
        yield self
        for each in self.within:
            yield from each.with_all_within()


def _blocks(module: nn.Module, name: str = "", inside: bool = False) -> Iterator[Block]:
    """The outermost elements of lists that are blocks, in order; `inside` of one, those of one kind alone."""
    children = {f"{name}{step}": child for step, child in module.named_children() if _matrices(child)}
    kinds = Counter(map(type, children.values()))
    for path, child in children.items():
        several = _matrices(child) >= 2 and next(child.children(), None) is not None
        alike = not inside or len(kinds) == 1
        mixed = isinstance(module, nn.ModuleDict) and kinds[type(child)] == 1  # the parts of a model, by name
        if isinstance(module, _LISTS) and type(child) not in _LISTS and several and alike and not mixed:
            yield Block(path, child, module, list(_blocks(child, f"{path}.", inside=True)))
        else:
            yield from _blocks(child, f"{path}.", inside)


def _matrices(module: nn.Module, recurse: bool = True) -> int:
    return sum(p.ndim >= 2 for p in module.parameters(recurse))


class Seen(TorchDispatchMode):
    """Which parameters each tensor was made of, as bits of a number: all that share their memory alike.

    `kept`, which is put back after the pass, is told of all that is written.
    """

    def __init__(self, model: nn.Module, kept: Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = list(model.parameters())
        self.of_blocks = 0  # bits of all blocks' parameters
        self.used = 0  # and of those that took part
        self._kept = kept
        self._made_of: dict[int, tuple[StorageWeakRef, int]] = {}
        self._count = 0
        self._bit = {p: 1 << number for number, p in enumerate(self.parameters)}
        for p, bit in self._bit.items():
            self._note(p, bit)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation; its results, and what it wrote into, are made of all that it was given."""
        kwargs = kwargs or {}
        tensors = tensors_in((*args, *kwargs.values()))
        out = run_operation(func, args, kwargs, tensors, self._kept)
        made_of = self.made_of(tensors)
        self.used |= made_of
        for result in tensors_in((out,)):
            self._note(result, made_of)
        return out

    def follow(self, block: Block) -> None:
        """Note what a block is given, the first time that it runs."""
        block.own = self._bits(block.module)
        block.siblings = self._bits(block.list_of) & ~block.own
        self.of_blocks |= block.own
        run = block.module.forward

        @wraps(run)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if block.number is None:
                block.number, self._count = self._count, self._count + 1
                self._note_given(block, [*output_tensors((args, kwargs), ())][::-1])  # which come from the last on
            return run(*args, **kwargs)

        # No hook, which `block.forward(x)` passes by; not as an attribute, which a compiled module hands on.
        block.module.__dict__["forward"] = noted

    def _note_given(self, block: Block, tensors: list[Tensor]) -> None:
        wide = {each.shape[-1:] for each in tensors if self.made_of([each])}
        given = [self.made_of([each]) for each in tensors if each.shape[-1:] in wide]  # not masks, nor graphs
        # The stream that blocks pass on has been through siblings, which an embedding of time has not, and through all that
        # has been what skips some of them.
        stream = next((bits for bits in given if bits & block.siblings), given[0] if given else 0)
        block.takes = stream
        for bits in given:
            if not bits & self.of_blocks or (stream & self.of_blocks and not stream & ~bits):
                block.takes |= bits
        block.beside = reduce(or_, given, 0) & ~block.takes

    def made_of(self, tensors: list[Tensor]) -> int:
        """Of several together."""
        bits = 0
        for tensor in tensors:
            storage, known = self._made_of.get(_key(tensor), (None, 0))
            bits |= known if storage is not None and not storage.expired() else 0
        return bits

    def _bits(self, module: nn.Module | None) -> int:
        """Those of a module's own parameters."""
        return sum(self._bit[p] for p in module.parameters()) if module is not None else 0

    def _note(self, tensor: Tensor, bits: int) -> None:
        key = _key(tensor)
        if key:
            self._made_of[key] = StorageWeakRef(tensor.untyped_storage()), bits


def _key(tensor: Tensor) -> int:
    """Of its memory; 0 where a layout of its own has none."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


def _in_order(blocks: list[Block]) -> list[Block]:
    """Those that ran, the first one first."""
    return sorted((block for block in blocks if block.number is not None), key=lambda block: block.number or 0)


def _taken_apart(block: Block, known: bool = False) -> list[Block]:
    """The blocks of a stage in its place, where they run one after the other; experts side by side stay one block.

    A single block is one of a stage where that is `known`, of others of its class, or where the stage itself is not called.
    """
    inner = [each for part in block.within for each in _taken_apart(part)]
    ran = _in_order(inner)
    one_by_one = all(b.takes & a.own for a, b in pairwise(ran))
    stage = len(ran) > 1 or (ran and (known or block.number is None))
    return ran if stage and len(ran) == len(inner) and one_by_one else [block]


def _tell_of_rest(model: nn.Module, seen: Seen, blocks: list[Block]) -> None:
    """Raise for blocks that ran without their forward; warn of those, and of parameters outside, that did not run."""
    called = reduce(or_, (block.own for block in _in_order(blocks)), 0)
    at_rest = [block for block in blocks if block.number is None and block.own & ~called]
    not_seen = [block.name for block in at_rest if block.own & seen.used & ~called]
    if not_seen and (blocks[0].list_of is not None or not called):  # weights that are used alone lie before what takes them
        raise LayerwiseError(
            f"{first_few(not_seen)} ran by another method than forward, or inside of a scripted model, which is not seen: "
            "write block(x), ask before torch.jit.script, or give factors of your own"
        )
    names = {id(p): canonical_name(name) for name, p in model.named_parameters()}
    inside = reduce(or_, (block.own for block in blocks), 0)
    unused = [p for n, p in enumerate(seen.parameters) if p.requires_grad and not (inside | seen.used) >> n & 1]
    told = [*(canonical_name(block.name) for block in at_rest if not block.own & seen.used), *(names[id(p)] for p in unused)]
    if told:
        warn(
            f"{first_few(told)} took no part in the forward pass, and count as a head does: give a batch= in which they "
            "do, a forward= that runs them, or factors of your own"
        )


def _far(ran: list[Block]) -> dict[Block, int]:
    """Of every block that ran, in that order, its distance; and in `takes` no longer what came in beside, or before it."""
    for number, block in enumerate(ran):
        block.takes &= ~reduce(or_, (other.beside for other in ran[:number] if block.takes & other.own), 0)
    far: dict[Block, int] = {}
    for block in reversed(ran):
        far[block] = 1 + max((far[other] for other in far if other.takes & block.own), default=0)
    return far


def _of_parameter(bit: int, far: Mapping[Block, int]) -> int:
    """That of the blocks it is in, or else one more than that of the blocks it comes before."""
    inside = [distance for block, distance in far.items() if block.own & bit]
    before = [distance + 1 for block, distance in far.items() if block.takes & bit]
    return max(inside or before, default=0)


def _end_in_heads(far: Mapping[Block, int]) -> bool:
    """Whether what comes last is unlike all that it comes after: heads in a list, of each task or after a backbone."""
    last = [block for block, distance in far.items() if distance == 1]
    upstream = {block: [type(b.module) for b in far if block.takes & b.own] for block in last}
    return all(kinds and type(block.module) not in kinds for block, kinds in upstream.items())
