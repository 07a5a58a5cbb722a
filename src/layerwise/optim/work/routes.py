"""The three ways of a matrix: shards to its owner, its unit step back to the shards, and over the replicas of a shard.

Each function sends at once and returns what to call to wait for the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from layerwise.common.tensors import local_part
from layerwise.errors import LayerwiseError
from layerwise.optim.work.collectives import all_gather, all_to_all
from layerwise.optim.work.local import MatrixJob
from layerwise.optim.work.placement import Domain, Placed

Index = tuple[int, int]  # of what is asked in a step, and of a parameter among those it is asked of


@dataclass(frozen=True)
class Task:
    """The work on one parameter, done by one process for all of its domain."""

    index: Index
    job: MatrixJob  # of the one parameter
    placed: Placed
    owner: int = 0  # number of the process in the domain

    @property
    def holds_any(self) -> bool:
        """Whether this process has any entries of the parameter."""
        return math.prod(self.placed.parts[self.placed.domain.shard]) > 0


def _of_my_replica(domain: Domain, tasks: Sequence[Task]) -> list[list[Task]]:
    """The tasks whose owner is among the shards of this replica, by the owner's place there."""
    first = domain.replica * domain.shard_count
    return [[task for task in tasks if task.owner == first + s] for s in range(domain.shard_count)]


def fetch(domain: Domain, tasks: Sequence[Task]) -> Callable[[], list[Task]]:
    """Bring whole tensors to their owners: the tasks of this process, with jobs that are whole."""
    by_owner = _of_my_replica(domain, tasks)
    mine = by_owner[domain.shard]
    if domain.shards is None or not any(by_owner):
        return lambda: mine
    received = all_to_all(
        domain.shards,
        [[_shard(task) for task in given] for given in by_owner],
        [[task.placed.parts[s] for task in mine] for s in range(domain.shard_count)],
        local_part(tasks[0].job.param),
    )

    def wait() -> list[Task]:
        parts = zip(*received(), strict=True)  # by task, its shards in order
        return [
            replace(task, job=task.job.of_fetched(torch.cat(shards, task.placed.dim)))
            for task, shards in zip(mine, parts, strict=True)
        ]

    return wait


def _shard(task: Task) -> Tensor:
    shard, expected = task.job.tensor(), task.placed.parts[task.placed.domain.shard]
    if tuple(shard.shape) != expected:
        raise LayerwiseError(
            f"a parameter of shape {tuple(task.job.param.shape)} has a shard of shape {tuple(shard.shape)} on process "
            f"{task.placed.domain.shard}, where equal chunks give {expected}: only equal chunks are supported"
        )
    return shard


def give_back(domain: Domain, tasks: Sequence[Task], steps: dict[Index, Tensor]) -> Callable[[], dict[Index, Tensor]]:
    """Send whole unit steps back as shards: this process's part of those of its replica."""
    assert domain.shards is not None
    by_owner = _of_my_replica(domain, tasks)
    if not any(by_owner):
        return dict
    pieces = [task.placed.cut(steps[task.index]) for task in by_owner[domain.shard]]
    received = all_to_all(
        domain.shards,
        [[cut[s] for cut in pieces] for s in range(domain.shard_count)],
        [[task.placed.parts[domain.shard] for task in given] for given in by_owner],
        local_part(tasks[0].job.param),
    )
    return lambda: _by_index(by_owner, received())


def spread(domain: Domain, tasks: Sequence[Task], steps: dict[Index, Tensor]) -> Callable[[], dict[Index, Tensor]]:
    """Give the replicas of this process's part the unit steps that its own replica did, and get theirs."""
    assert domain.replicas is not None
    by_replica = [[task for task in tasks if task.owner // domain.shard_count == r] for r in range(domain.replica_count)]
    received = all_gather(
        domain.replicas,
        [steps[task.index] for task in by_replica[domain.replica]],
        [[task.placed.parts[domain.shard] for task in given] for given in by_replica],
        local_part(tasks[0].job.param),
    )
    return lambda: _by_index(by_replica, received())


def _by_index(tasks: Sequence[Sequence[Task]], tensors: Sequence[Sequence[Tensor]]) -> dict[Index, Tensor]:
    pairs = zip(chain.from_iterable(tasks), chain.from_iterable(tensors), strict=True)
    return {task.index: tensor for task, tensor in pairs}
