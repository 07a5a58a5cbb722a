"""The three ways of a matrix: shards to its owner, its unit step back to the shards, and over the replicas of a shard.

Tensors between processes are packed into one flat buffer per collective. Each way yields once when it has sent, so that
other work goes on before its result is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.common.tensors import all_gather_single, local_part
from layerwise.errors import LayerwiseError
from layerwise.optim.work.local import MatrixJob
from layerwise.optim.work.placement import Domain, Placed, Shape

#: What every process holds after an exchange, by the process it came from; calling it waits for that.
Pending = Callable[[], list[list[Tensor]]]


def all_to_all(
    group: dist.ProcessGroup, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Shape]], like: Tensor
) -> Pending:
    """Send ``outgoing[p]`` to each process p of the group and receive tensors of shapes ``incoming[p]`` from it."""
    sent = _pack([tensor for tensors in outgoing for tensor in tensors], like)
    lengths = [_length(shapes) for shapes in incoming]
    received = like.new_empty(sum(lengths))
    given = [sum(t.numel() for t in tensors) for tensors in outgoing]
    work = dist.all_to_all_single(received, sent, lengths, given, group=group, async_op=True)
    return partial(_received, work, sent, received, lengths, incoming)


def all_gather(group: dist.ProcessGroup, mine: Sequence[Tensor], shapes: Sequence[Sequence[Shape]], like: Tensor) -> Pending:
    """Give ``mine`` to every process of the group; ``shapes[p]`` are those of what each process p gives.

    The collective wants equal lengths, so all are padded to the longest.
    """
    longest = max(map(_length, shapes))
    sent = _pack(mine, like, longest)
    received = like.new_empty(longest * len(shapes))
    work = all_gather_single(received, sent, group, async_op=True)
    return partial(_received, work, sent, received, longest, shapes)


def _received(
    work: dist.Work | None, sent: Tensor, received: Tensor, lengths: list[int] | int, shapes: Sequence[Sequence[Shape]]
) -> list[list[Tensor]]:
    """Wait for it: ``sent`` has to live until here."""
    if work is not None:
        work.wait()
    return [_unpack(flat, given) for flat, given in zip(received.split(lengths), shapes, strict=True)]


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


Index = tuple[int, int]  # of what is asked in a step, and of a parameter among those it is asked of
Steps = dict[Index, Tensor]  # unit steps


@dataclass(frozen=True)
class Task:
    """The work on one parameter, done by one process for all of its domain."""

    index: Index
    job: MatrixJob  # of the one parameter
    placed: Placed
    owner: int = 0  # number of the process in the domain


def _of_my_replica(domain: Domain, tasks: Sequence[Task]) -> list[list[Task]]:
    """The tasks whose owner is among the shards of this replica, by the owner's place there."""
    first = domain.replica * domain.shard_count
    return [[task for task in tasks if task.owner == first + s] for s in range(domain.shard_count)]


def fetch(domain: Domain, tasks: Sequence[Task]) -> Generator[None, None, list[Task]]:
    """Bring whole tensors to their owners: the tasks of this process, with jobs that are whole."""
    by_owner = _of_my_replica(domain, tasks)
    mine = by_owner[domain.shard]
    if domain.shards is None or not any(by_owner):
        yield
        return mine
    received = all_to_all(
        domain.shards,
        [[_shard(task) for task in given] for given in by_owner],
        [[task.placed.parts[s] for task in mine] for s in range(domain.shard_count)],
        local_part(tasks[0].job.param),
    )
    yield
    parts = zip(*received(), strict=True)  # by task, its shards in order
    return [
        replace(task, job=task.job.of_fetched(torch.cat(shards, task.placed.dim)))
        for task, shards in zip(mine, parts, strict=True)
    ]


def _shard(task: Task) -> Tensor:
    shard, expected = task.job.part(), task.placed.parts[task.placed.domain.shard]
    if tuple(shard.shape) != expected:
        raise LayerwiseError(
            f"a parameter of shape {tuple(task.job.param.shape)} has a shard of shape {tuple(shard.shape)} on process "
            f"{task.placed.domain.shard}, where equal chunks give {expected}: only equal chunks are supported"
        )
    return shard


def give_back(domain: Domain, tasks: Sequence[Task], steps: Steps) -> Generator[None, None, Steps]:
    """Send whole unit steps back as shards: this process's part of those of its replica."""
    assert domain.shards is not None
    by_owner = _of_my_replica(domain, tasks)
    if not any(by_owner):
        yield
        return {}
    pieces = [task.placed.cut(steps[task.index]) for task in by_owner[domain.shard]]
    received = all_to_all(
        domain.shards,
        [[cut[s] for cut in pieces] for s in range(domain.shard_count)],
        [[task.placed.parts[domain.shard] for task in given] for given in by_owner],
        local_part(tasks[0].job.param),
    )
    yield
    return _by_index(by_owner, received())


def spread(domain: Domain, tasks: Sequence[Task], steps: Steps) -> Generator[None, None, Steps]:
    """Give the replicas of this process's part the unit steps that its own replica did, and get theirs."""
    assert domain.replicas is not None
    by_replica = [[task for task in tasks if task.owner // domain.shard_count == r] for r in range(domain.replica_count)]
    received = all_gather(
        domain.replicas,
        [steps[task.index] for task in by_replica[domain.replica]],
        [[task.placed.parts[domain.shard] for task in given] for given in by_replica],
        local_part(tasks[0].job.param),
    )
    yield
    return _by_index(by_replica, received())


def _by_index(tasks: Sequence[Sequence[Task]], tensors: Sequence[Sequence[Tensor]]) -> Steps:
    pairs = zip(chain.from_iterable(tasks), chain.from_iterable(tensors), strict=True)
    return {task.index: tensor for task, tensor in pairs}
