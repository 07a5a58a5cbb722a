"""The matrix work of a step, each matrix on one process and the work spread evenly over all of them.

Every process holds either all of a parameter (data parallel) or a shard of it (FSDP2). A round of matrices goes through
up to three exchanges: shards to the owner of each matrix, unit steps back to the shards, and over the replicas of a
shard. Rounds overlap: while one is computed, the next is being fetched and the last one sent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.common.checked import checked
from layerwise.common.tensors import local_part
from layerwise.errors import LayerwiseError
from layerwise.geometry.spectral.polar import working_dtype
from layerwise.optim.work import shardwise, stacks
from layerwise.optim.work.job import DualNorms, MatrixJob
from layerwise.optim.work.local import LocalWork
from layerwise.optim.work.placement import Domain, place
from layerwise.optim.work.plan import assign, direction_cost, norm_cost, rounds
from layerwise.optim.work.routes import Task, fetch, give_back, spread

Directions = Sequence[tuple[int, Tensor]]  # index of a job, and its unit step
Cost = Callable[[MatrixJob], int]


@checked
class DistributedWork:
    """Matrix work over the processes that hold the parameters; see the module.

    What needs no whole matrix (sign and Euclidean geometries), or has its matrices whole already (sharded experts), is
    done where it is and never sent.

    Args:
        group: the processes that take the same step: where plain tensors are replicated. None: the default group.
            DTensors bring their own, from their mesh.
        bucket_bytes: how much a process receives in one round, at most, unless one matrix from each is more.

    Examples:
        >>> import torch.distributed as dist
        >>> dist.is_initialized()  # after init_process_group: optimizer.work = lw.DistributedWork(group)
        False
    """

    def __init__(self, group: dist.ProcessGroup | None = None, bucket_bytes: int = 64 * 2**20) -> None:
        self.group = group
        self.bucket_bytes = bucket_bytes
        self._local = LocalWork()
        self._host = _host_group(group)
        self._agreed: set[object] = set()

    def __reduce__(self) -> tuple[type[DistributedWork], tuple[None, int]]:
        if self.group is not None:
            raise LayerwiseError(
                "work with a process group of its own cannot be copied; set it again on the copy"
            )
        return type(self), (None, self.bucket_bytes)

    # ------------------------------------------------------------------------------------------------ the protocol

    def anywhere(self, flags: Tensor) -> Tensor:
        """``flags``, true where they are true on any process. On the host this never waits for a GPU."""
        self._agree("parameters", flags.numel())
        seen = flags.int()
        dist.all_reduce(
            seen, dist.ReduceOp.MAX, group=self._host if seen.device.type == "cpu" else self.group
        )
        return seen.bool()

    def check_same(self, tensors: Sequence[Tensor], otherwise: str) -> None:
        mine = [float(tensor.double().sum()) for tensor in tensors]
        theirs: list[list[float]] = [[]] * dist.get_world_size(self._host)
        dist.all_gather_object(theirs, mine, group=self._host)
        if any(repr(other) != repr(theirs[0]) for other in theirs):  # by text: nan is like nan
            raise LayerwiseError(otherwise)

    def norms(self, jobs: Sequence[MatrixJob]) -> list[Tensor]:
        alone, by_shard, shared = self._sorted(jobs)
        found: dict[int, Tensor] = {}
        waiting = [
            (tasks, shardwise.dual_norms(domain, [t.job for t in tasks])) for domain, tasks in by_shard
        ]
        for domain, tasks in shared:
            found |= self._shared_norms(domain, tasks)
        for tasks, wait in waiting:
            found |= {task.index: norm for task, norm in zip(tasks, wait(), strict=True)}
        found |= {t.index: n for t, n in zip(alone, self._local.norms([t.job for t in alone]), strict=True)}
        return [found[i] for i in range(len(jobs))]

    def directions(self, jobs: Sequence[MatrixJob]) -> Iterator[Directions]:
        alone, by_shard, shared = self._sorted(jobs)
        parts: Iterable[Iterator[Directions | None]] = chain(
            (self._shardwise_directions(domain, tasks) for domain, tasks in by_shard),
            chain.from_iterable(self._shared_directions(domain, tasks) for domain, tasks in shared),
            (
                iter([[(alone[i].index, step) for i, step in some]])
                for some in self._local.directions([t.job for t in alone])
            ),
        )
        yield from overlapped(parts)
        for domain, tasks in by_shard:
            shardwise.fill_dual_norms(domain, [task.job for task in tasks if task.job.dual is not None])
        for domain, tasks in shared:
            _share_dual_norms(domain, [task.job.dual for task in tasks if task.job.dual is not None])

    # ---------------------------------------------------------------------------------------------------- planning

    def _sorted(
        self, jobs: Sequence[MatrixJob]
    ) -> tuple[list[Task], list[tuple[Domain, list[Task]]], list[tuple[Domain, list[Task]]]]:
        """Jobs that every process does for itself, those done shard by shard, and those that are shared out.

        The latter two by domain; what is shared out also by dtype and device, as it travels in one buffer.
        """
        alone: list[Task] = []
        by_shard: dict[Domain, list[Task]] = {}
        shared: dict[tuple[Domain, torch.dtype, torch.device], list[Task]] = {}
        for i, job in enumerate(jobs):
            task = Task(i, job, place(job.param, self.group))
            domain = task.placed.domain
            if job.deviation is not None:
                shared.setdefault((domain, job.param.dtype, job.param.device), []).append(task)
            elif domain.shard_count > 1 and shardwise.applies(job):
                by_shard.setdefault(domain, []).append(task)
            elif domain.size == 1 or (domain.shard_count == 1 and job.geometry.family != "spectral"):
                alone.append(task)  # nothing to send, or cheaper to do than to send
            else:
                shared.setdefault((domain, job.param.dtype, job.param.device), []).append(task)
        self._agree("jobs", tuple((job.layout, job.geometry, tuple(job.param.shape)) for job in jobs))
        return alone, list(by_shard.items()), [(domain, tasks) for (domain, _, _), tasks in shared.items()]

    def _rounds(self, domain: Domain, tasks: Sequence[Task], cost: Cost) -> Iterator[list[Task]]:
        planned = assign(tuple(cost(task.job) for task in tasks), domain.size)
        owners = [
            owner if task.job.deviation is None else task.job.deviation.owner
            for task, owner in zip(tasks, planned, strict=True)
        ]
        sizes = [math.prod(t.job.param.shape) * t.job.param.element_size() for t in tasks]
        for numbers in rounds(owners, sizes, self.bucket_bytes // domain.replica_count):
            yield [replace(tasks[i], owner=owners[i]) for i in numbers]

    def _agree(self, what: str, value: object) -> None:
        """Raise on every process, rather than hang on some, where the processes are about to do different steps."""
        if (what, value) in self._agreed:
            return
        mine = hashlib.sha256(repr(value).encode()).hexdigest()
        theirs: list[str] = [""] * dist.get_world_size(self._host)
        dist.all_gather_object(theirs, mine, group=self._host)
        for process, other in enumerate(theirs):
            if other != theirs[0]:
                raise LayerwiseError(
                    f"the optimizers of processes 0 and {process} do not have the same {what}: make the same groups on "
                    "every process, or set optimizer.work to DistributedWork(group) of the processes that share a model, "
                    "or to LocalWork() where each process trains its own"
                )
        self._agreed.add((what, value))

    # ------------------------------------------------------------------------------------------------------- norms

    def _shared_norms(self, domain: Domain, tasks: Sequence[Task]) -> dict[int, Tensor]:
        counts = [task.job.layout.count(task.job.param.shape) for task in tasks]
        like = local_part(tasks[0].job.param)
        total = torch.zeros(sum(counts), dtype=working_dtype(like), device=like.device)
        found = {task.index: part for task, part in zip(tasks, total.split(counts), strict=True)}
        stacked, travelling = _stacked(tasks)
        held = [task for task in stacked if task.holds_any]
        owned = [stacks.own(task.job, task.placed) for task in held]
        for task, norms in zip(held, self._local.norms(owned), strict=True):
            stacks.place_units(task.job, task.placed, norms, found[task.index])
        for _ in overlapped(
            self._norm_round(domain, some, found) for some in self._rounds(domain, travelling, norm_cost)
        ):
            pass
        # Each unit's norm was filled in by one process alone, so the sums are exact and the same everywhere.
        for group in (domain.shards, domain.replicas):
            if group is not None:
                dist.all_reduce(total, group=group)
        return found

    def _norm_round(
        self, domain: Domain, tasks: Sequence[Task], found: dict[int, Tensor]
    ) -> Iterator[Directions | None]:
        fetched = fetch(domain, tasks)
        yield None
        mine = fetched()
        for task, norm in zip(mine, self._local.norms([task.job for task in mine]), strict=True):
            found[task.index].copy_(norm)

    # -------------------------------------------------------------------------------------------------- directions

    @staticmethod
    def _shardwise_directions(domain: Domain, tasks: Sequence[Task]) -> Iterator[Directions | None]:
        steps = shardwise.unit_steps(domain, [task.job for task in tasks])
        yield None
        yield [(task.index, step) for task, step in zip(tasks, steps(), strict=True)]

    def _shared_directions(
        self, domain: Domain, tasks: Sequence[Task]
    ) -> Iterator[Iterator[Directions | None]]:
        stacked, travelling = _stacked(tasks)
        for some in self._rounds(domain, travelling, direction_cost):
            yield self._direction_round(domain, some)
        held = [task for task in stacked if task.holds_any]
        owned = [stacks.own(task.job, task.placed) for task in held]
        for directions in self._local.directions(owned):
            for i, _ in directions:
                stacks.place_dual_norms(held[i].job, held[i].placed, owned[i])
            yield iter([[(held[i].index, step) for i, step in directions]])
        yield iter([[(task.index, task.job.tensor()) for task in stacked if not task.holds_any]])

    def _direction_round(self, domain: Domain, tasks: Sequence[Task]) -> Iterator[Directions | None]:
        fetched = fetch(domain, tasks)
        yield None
        mine = fetched()
        own = self._local.directions([task.job for task in mine])
        steps = {mine[i].index: step for some in own for i, step in some}
        if domain.shards is not None:
            returned = give_back(domain, tasks, steps)
            yield None
            steps = returned()
        if domain.replicas is not None:
            shared = spread(domain, tasks, steps)
            yield None
            steps = shared()
        yield list(steps.items())


def _share_dual_norms(domain: Domain, norms: Sequence[DualNorms]) -> None:
    """Each unit's was filled in by one process alone, so the sums are exact and the same everywhere."""
    if not norms:
        return
    total = torch.cat([dual.values for dual in norms])
    for group in (domain.shards, domain.replicas):
        if group is not None:
            dist.all_reduce(total, group=group)
    for dual, values in zip(norms, total.split([len(dual.values) for dual in norms]), strict=True):
        dual.values.copy_(values)


def _stacked(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """Those of which each process does the matrices it holds, and those that travel to an owner."""
    kinds: tuple[list[Task], list[Task]] = ([], [])
    for task in tasks:
        kinds[0 if task.job.deviation is None and stacks.applies(task.job, task.placed) else 1].append(task)
    return kinds


def overlapped(parts: Iterable[Iterator[Directions | None]]) -> Iterator[Directions]:
    """Run iterators that yield None whenever they have sent something: each goes on after younger ones have sent, too.

    Every process runs the same parts, so the exchanges come in the same order everywhere.
    """
    running: list[Iterator[Directions | None]] = []  # youngest first
    waiting = iter(parts)
    while True:
        new = next(waiting, None)
        if new is not None:
            running.insert(0, new)
        if not running:
            return
        for part in tuple(running):
            for item in part:
                if item is None:
                    break
                yield item
            else:
                running.remove(part)


def _host_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The same processes, for tensors on the host: ``group`` itself where its backend takes them."""
    if "cpu" in str(dist.get_backend_config(group)):
        return group
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    host: dist.ProcessGroup = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return host
