"""Which processes hold which part of a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from layerwise.errors import LayerwiseError

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
    return Placed(
        Domain(mesh.get_group(shards[0]), replicating),
        dim,
        part_shapes(tuple(param.shape), dim, mesh.size(shards[0])),
    )


def part_shapes(shape: Sequence[int], dim: int, count: int) -> tuple[Shape, ...]:
    """The parts of torch.chunk, which DTensor shards as: the last ones are smaller or empty."""
    size = shape[dim]
    step = -(-size // count)
    lengths = [min(step, max(0, size - i * step)) for i in range(count)]
    return tuple((*shape[:dim], length, *shape[dim + 1 :]) for length in lengths)
