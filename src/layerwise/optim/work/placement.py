"""Which processes hold which part of a parameter, who of them does which work, and in which order.

Who does what are pure functions of shapes, so that every process comes to the same plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from layerwise.errors import LayerwiseError
from layerwise.geometry import Spectral
from layerwise.geometry.spectral.spectral import ON_CPU, ON_GPU
from layerwise.optim.work.local import MatrixJob

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Domain:
    """The processes that hold a parameter, seen from this one: a grid of replicas x shards.

    ``shards`` is the group of those that hold its parts between them, ``replicas`` of those that hold the same part as
    this process; None where there is just this one. Process ``(r, s)`` of the grid has the number
    ``r * shard_count + s``.
    """

    shards: dist.ProcessGroup | None
    replicas: dist.ProcessGroup | None

    @property
    def shard_count(self) -> int:
        return 1 if self.shards is None else dist.get_world_size(self.shards)

    @property
    def shard(self) -> int:
        return 0 if self.shards is None else dist.get_rank(self.shards)

    @property
    def replica_count(self) -> int:
        return 1 if self.replicas is None else dist.get_world_size(self.replicas)

    @property
    def replica(self) -> int:
        return 0 if self.replicas is None else dist.get_rank(self.replicas)

    @property
    def size(self) -> int:
        return self.shard_count * self.replica_count

    @property
    def me(self) -> int:
        return self.replica * self.shard_count + self.shard


@dataclass(frozen=True)
class Placed:
    """Where a parameter is: its domain, the dimension it is cut along, and the shape of each shard."""

    domain: Domain
    dim: int
    parts: tuple[Shape, ...]

    def cut(self, whole: Tensor) -> list[Tensor]:
        return list(whole.split([part[self.dim] for part in self.parts], self.dim)) if whole.ndim else [whole]


def place(param: Tensor, group: dist.ProcessGroup | None) -> Placed:
    """Where ``param`` is. A plain tensor is replicated over ``group`` (None: over the default group).

    Raises:
        LayerwiseError: for a DTensor that is cut along more than one mesh dimension, or has partial sums.
    """
    if not isinstance(param, DTensor):
        domain = Domain(None, group if group is not None else dist.group.WORLD)
        return Placed(domain, 0, (tuple(param.shape),))
    mesh, placements = param.device_mesh, param.placements
    wide = [i for i in range(mesh.ndim) if mesh.size(i) > 1]
    shards = [i for i in wide if isinstance(placements[i], Shard)]
    replicas = [i for i in wide if isinstance(placements[i], Replicate)]
    if len(shards) > 1 or len(shards) + len(replicas) < len(wide):
        raise LayerwiseError(
            f"a parameter of shape {tuple(param.shape)} has the placements {tuple(placements)} on {mesh}: the work on "
            "whole matrices is done for parameters sharded over one mesh dimension and replicated over the others "
            "(fully_shard, HSDP, or tensor parallelism alone); fully_shard over tensor parallelism is not supported"
        )
    # With several replicating dimensions the work is shared over the first; the others repeat it.
    replicating = mesh.get_group(replicas[0]) if replicas else None
    if not shards:
        return Placed(Domain(None, replicating), 0, (tuple(param.shape),))
    placement = placements[shards[0]]
    assert isinstance(placement, Shard)
    dim = placement.dim % param.ndim
    parts = part_shapes(tuple(param.shape), dim, mesh.size(shards[0]))
    return Placed(Domain(mesh.get_group(shards[0]), replicating), dim, parts)


def part_shapes(shape: Sequence[int], dim: int, count: int) -> tuple[Shape, ...]:
    """The parts of torch.chunk, which DTensor shards as: the last ones are smaller or empty."""
    size = shape[dim]
    step = -(-size // count)
    lengths = [min(step, max(0, size - i * step)) for i in range(count)]
    return tuple((*shape[:dim], length, *shape[dim + 1 :]) for length in lengths)


def direction_cost(job: MatrixJob) -> int:
    """Multiply-adds of a job's unit steps, up to a common factor."""
    return sum(k * _polar_cost(*sorted(sides)) for k, *sides in job.layout.shapes(job.param.shape))


def norm_cost(job: MatrixJob) -> int:
    """Multiply-adds of a job's dual norms, up to a common factor."""
    return sum(k * _nuclear_cost(job, *sorted(sides)) for k, *sides in job.layout.shapes(job.param.shape))


def _polar_cost(small: int, large: int) -> int:
    """One Newton-Schulz step: the Gram matrix, its square, and the product with the matrix."""
    return small * small * (2 * large + small)


def _nuclear_cost(job: MatrixJob, small: int, large: int) -> int:
    exact_up_to = (ON_CPU if job.param.device.type == "cpu" else ON_GPU)[1]
    lanczos = isinstance(job.geometry, Spectral) and (
        job.geometry.nuclear == "lanczos" or (job.geometry.nuclear == "auto" and small > exact_up_to)
    )
    # seven readings by eight vectors
    return 56 * small * large if lanczos else 8 * _polar_cost(small, large)


@lru_cache(maxsize=64)
def assign(costs: tuple[int, ...], processes: int) -> tuple[int, ...]:
    """The process that does each job: the costliest first, each to the process with the least so far.

    The busiest process gets at most 4/3 of the best possible maximum (Graham 1969).
    """
    load = [(0, p) for p in range(processes)]
    owner = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least, p = load[0]
        owner[i] = p
        heapq.heapreplace(load, (least + costs[i], p))
    return tuple(owner)


def rounds(owners: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Jobs in rounds, each owner's own jobs in a round together at most ``limit`` large (a larger one comes alone)."""
    filled: dict[int, tuple[int, int]] = {}  # owner -> its round, and how much is in it
    result: list[list[int]] = []
    for i, (owner, size) in enumerate(zip(owners, sizes, strict=True)):
        number, used = filled.get(owner, (0, 0))
        if used and used + size > limit:
            number, used = number + 1, 0
        filled[owner] = (number, used + size)
        if number == len(result):
            result.append([])
        result[number].append(i)
    return result
