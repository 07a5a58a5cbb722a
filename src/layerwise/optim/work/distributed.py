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
from layerwise.common.group_by import group_by
from layerwise.common.tensors import local_part
from layerwise.errors import LayerwiseError
from layerwise.geometry.spectral.newton_schulz import working_dtype
from layerwise.optim.work import unsent
from layerwise.optim.work.job import Job
from layerwise.optim.work.local import LocalWork, MatrixJob
from layerwise.optim.work.placement import Domain, assign, direction_cost, norm_cost, place, rounds
from layerwise.optim.work.routes import Index, Task, fetch, give_back, spread

Directions = Sequence[tuple[Index, Tensor]]  # unit steps
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
            raise LayerwiseError("work with a process group of its own cannot be copied; set it again on the copy")
        return type(self), (None, self.bucket_bytes)

    # ------------------------------------------------------------------------------------------------ the protocol

    def anywhere(self, flags: Tensor) -> Tensor:
        """``flags``, true where they are true on any process. On the host this never waits for a GPU."""
        self._agree("parameters", flags.numel())
        seen = flags.int()
        dist.all_reduce(seen, dist.ReduceOp.MAX, group=self._host if seen.device.type == "cpu" else self.group)
        return seen.bool()

    def check_same(self, tensors: Sequence[Tensor], otherwise: str) -> None:
        mine = [float(tensor.double().sum()) for tensor in tensors]
        theirs: list[list[float]] = [[]] * dist.get_world_size(self._host)
        dist.all_gather_object(theirs, mine, group=self._host)
        if any(repr(other) != repr(theirs[0]) for other in theirs):  # by text: nan is like nan
            raise LayerwiseError(otherwise)

    def norms(self, asked: Sequence[MatrixJob]) -> list[Tensor]:
        alone, by_shard, shared = self._sorted(asked)
        found: dict[Index, Tensor] = {}
        waiting = [(tasks, unsent.dual_norms(domain, [t.job for t in tasks])) for domain, tasks in by_shard]
        for domain, tasks in shared:
            found |= self._shared_norms(domain, tasks)
        for tasks, wait in waiting:
            found |= {task.index: norm for task, norm in zip(tasks, wait(), strict=True)}
        found |= self._local_norms(alone)
        return [torch.stack([found[number, row] for row in range(len(job.jobs))]) for number, job in enumerate(asked)]

    def directions(self, asked: Sequence[MatrixJob]) -> Iterator[tuple[Sequence[Job], Sequence[Tensor]]]:
        alone, by_shard, shared = self._sorted(asked)
        held = [task for _, tasks in shared for task in tasks if unsent.is_held(task)]
        owned = [unsent.own_matrices(task) for task in held]
        parts: Iterable[Iterator[Directions | None]] = chain(
            (self._shardwise_directions(domain, tasks) for domain, tasks in by_shard),
            (self._round(domain, some) for domain, tasks in shared for some in self._rounds(domain, tasks, direction_cost)),
            (iter([some]) for some in self._local_directions([*alone, *owned])),
        )
        for some in overlapped(parts):
            yield [asked[number].jobs[row] for (number, row), _ in some], [step for _, step in some]
        for task, own in zip(held, owned, strict=True):
            filled, wanted = own.job.jobs[0].dual, task.job.jobs[0].dual
            if filled is not None and wanted is not None:
                unsent.place_units(task, filled, wanted)
        for domain, tasks in shared:
            duals = [task.job.jobs[0].dual for task in tasks if task.job.jobs[0].dual is not None]
            if duals:
                total = _added_up(domain, torch.cat(duals))
                torch._foreach_copy_(duals, list(total.split([len(dual) for dual in duals])))

    # ---------------------------------------------------------------------------------------------------- planning

    def _sorted(
        self, asked: Sequence[MatrixJob]
    ) -> tuple[list[Task], list[tuple[Domain, list[Task]]], list[tuple[Domain, list[Task]]]]:
        """Parameters that every process does for itself, those done shard by shard, and those that are shared out.

        The latter two by domain; what is shared out also by dtype and device, as it travels in one buffer.
        """
        alone: list[Task] = []
        by_shard: dict[Domain, list[Task]] = {}
        shared: dict[tuple[Domain, torch.dtype, torch.device], list[Task]] = {}
        each = ((n, row, job) for n, some in enumerate(asked) for row, job in enumerate(some.pieces(1)))
        for number, row, job in each:
            task = Task((number, row), job, place(job.param, self.group))
            domain = task.placed.domain
            same, cut = job.deviation is None, domain.shard_count > 1  # all replicas have one tensor; it is in parts
            if same and cut and unsent.is_entrywise(job):
                by_shard.setdefault(domain, []).append(task)
            elif same and (domain.size == 1 or (not cut and job.geometry.family != "spectral")):
                alone.append(task)  # nothing to send, or cheaper to do than to send
            else:
                shared.setdefault((domain, job.param.dtype, job.param.device), []).append(task)
        forms = tuple((len(job.jobs), job.layout, job.geometry, tuple(job.param.shape)) for job in asked)
        self._agree("jobs", forms)
        return alone, list(by_shard.items()), [(domain, tasks) for (domain, _, _), tasks in shared.items()]

    def _rounds(self, domain: Domain, tasks: Sequence[Task], cost: Cost) -> Iterator[list[Task]]:
        """Those whose matrices travel to an owner."""
        tasks = [task for task in tasks if not unsent.is_held(task)]
        planned = assign(tuple(cost(task.job) for task in tasks), domain.size)
        deviations = [task.job.deviation for task in tasks]
        owners = [owner if own is None else own.owner for own, owner in zip(deviations, planned, strict=True)]
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

    # ------------------------------------------------------------------------------------------ what is held whole

    def _local_norms(self, tasks: Sequence[Task]) -> dict[Index, Tensor]:
        together = _together(tasks)
        found = self._local.norms([job for _, job in together])
        pairs = zip(together, found, strict=True)
        return {task.index: norm for (some, _), norms in pairs for task, norm in zip(some, norms, strict=True)}

    def _local_directions(self, tasks: Sequence[Task]) -> Iterator[Directions]:
        index = {task.job.jobs[0].name: task.index for task in tasks}
        for jobs, steps in self._local.directions([job for _, job in _together(tasks)]):
            yield [(index[job.name], step) for job, step in zip(jobs, steps, strict=True)]

    # ------------------------------------------------------------------------------------------------------- norms

    def _shared_norms(self, domain: Domain, tasks: Sequence[Task]) -> dict[Index, Tensor]:
        counts = [task.job.layout.count(task.job.param.shape) for task in tasks]
        like = local_part(tasks[0].job.param)
        total = torch.zeros(sum(counts), dtype=working_dtype(like), device=like.device)
        found = {task.index: part for task, part in zip(tasks, total.split(counts), strict=True)}
        held = [task for task in tasks if unsent.is_held(task)]
        own = self._local_norms([unsent.own_matrices(task) for task in held])
        for task in held:
            unsent.place_units(task, own[task.index], found[task.index])
        for _ in overlapped(self._norm_round(domain, some, found) for some in self._rounds(domain, tasks, norm_cost)):
            pass
        _added_up(domain, total)
        return found

    def _norm_round(self, domain: Domain, tasks: Sequence[Task], found: dict[Index, Tensor]) -> Iterator[Directions | None]:
        mine = yield from fetch(domain, tasks)
        for index, norm in self._local_norms(mine).items():
            found[index].copy_(norm)

    # -------------------------------------------------------------------------------------------------- directions

    @staticmethod
    def _shardwise_directions(domain: Domain, tasks: Sequence[Task]) -> Iterator[Directions | None]:
        steps = yield from unsent.unit_steps(domain, [task.job for task in tasks])
        yield [(task.index, step) for task, step in zip(tasks, steps, strict=True)]

    def _round(self, domain: Domain, tasks: Sequence[Task]) -> Iterator[Directions | None]:
        mine = yield from fetch(domain, tasks)
        steps = {index: step for some in self._local_directions(mine) for index, step in some}
        if domain.shards is not None:
            steps = yield from give_back(domain, tasks, steps)
        if domain.replicas is not None:
            steps = yield from spread(domain, tasks, steps)
        yield list(steps.items())


def _together(tasks: Sequence[Task]) -> list[tuple[list[Task], MatrixJob]]:
    """Those whose parameters were asked for together, and of which this process holds alike parts; and all work on them."""
    alike = group_by(tasks, lambda task: (task.index[0], task.job.param.shape)).values()
    return [(some, replace(some[0].job, jobs=[task.job.jobs[0] for task in some])) for some in alike]


def _added_up(domain: Domain, norms: Tensor) -> Tensor:
    """In place: each unit's was filled in by one process alone, so the sums are exact and the same everywhere."""
    for group in (domain.shards, domain.replicas):
        if group is not None:
            dist.all_reduce(norms, group=group)
    return norms


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
