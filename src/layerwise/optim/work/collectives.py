"""Tensors between processes, packed into one flat buffer per collective and sent while other work goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.optim.work.placement import Shape

#: What every process holds after an exchange, by the process it came from; calling it waits for that.
Pending = Callable[[], list[list[Tensor]]]

# its name until torch 2.12, and since
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_to_all(
    group: dist.ProcessGroup,
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[Shape]],
    like: Tensor,
) -> Pending:
    """Send ``outgoing[p]`` to each process p of the group and receive tensors of shapes ``incoming[p]`` from it."""
    sent = _pack([tensor for tensors in outgoing for tensor in tensors], like)
    lengths = [_length(shapes) for shapes in incoming]
    received = like.new_empty(sum(lengths))
    work = dist.all_to_all_single(
        received,
        sent,
        lengths,
        [sum(t.numel() for t in tensors) for tensors in outgoing],
        group=group,
        async_op=True,
    )

    def wait() -> list[list[Tensor]]:
        _wait(work, sent)
        return [_unpack(flat, shapes) for flat, shapes in zip(received.split(lengths), incoming, strict=True)]

    return wait


def all_gather(group: dist.ProcessGroup, mine: Sequence[Tensor], shapes: Sequence[Sequence[Shape]], like: Tensor) -> Pending:
    """Give ``mine`` to every process of the group; ``shapes[p]`` are those of what each process p gives.

    The collective wants equal lengths, so all are padded to the longest.
    """
    longest = max(map(_length, shapes))
    sent = _pack(mine, like, longest)
    received = like.new_empty(longest * len(shapes))
    work = _all_gather_flat(received, sent, group=group, async_op=True)

    def wait() -> list[list[Tensor]]:
        _wait(work, sent)
        return [_unpack(flat, given) for flat, given in zip(received.split(longest), shapes, strict=True)]

    return wait


def _wait(work: dist.Work | None, sent: Tensor) -> None:
    """``sent`` has to live until here."""
    if work is not None:
        work.wait()


def _length(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def _pack(tensors: Sequence[Tensor], like: Tensor, length: int | None = None) -> Tensor:
    """One flat tensor of all, in the dtype of ``like``."""
    total = sum(t.numel() for t in tensors)
    flat = like.new_zeros(total if length is None else length)
    if tensors:
        parts = flat[:total].split([t.numel() for t in tensors])
        views = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
        torch._foreach_copy_(views, list(tensors))
    return flat


def _unpack(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    parts = flat[: _length(shapes)].split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
