"""The work on whole matrices: what is asked, and its doing where this process holds them all, equal shapes in batches.

A kind of update or a rate rule makes a :class:`MatrixJob` of all parameters that are alike where it needs a norm or a unit
step of each unit. What the matrices come from, a :class:`Source` makes for all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.common.checked import checked
from layerwise.errors import LayerwiseError
from layerwise.geometry import Geometry, Layout
from layerwise.geometry.layout import remember
from layerwise.geometry.spectral.newton_schulz import PROCESSOR_UNITS, matrices_at_once
from layerwise.optim.work.job import (
    Anywhere,
    Deviation,
    Job,
    current_momentum,
    stack_of,
    stacked,
    stacked_by,
    state_and_gradients,
)

#: On a GPU a batch fills the device where one small matrix cannot; above this size one matrix does. Not yet measured
#: here: the Muon literature's number.
BATCH_BELOW = 1024
#: What a batch whose norms are taken may hold: on a GPU little beside a model, on a CPU what stays in the cache (with
#: 16 MiB the C library hands the memory back after every batch, and 8,000 to 20,000 page faults a step get it again). Where
#: a processor has units for bfloat16, the host's work, which is a batch's however large, counts beside products: larger ones
#: (norms of d = 384; one thread, AMX: 0.90 of their time). Unit steps have as many there as fit in bfloat16.
NORM_BYTES = {"cpu": 2**23, "cpu with units": 2**25, "gpu": 2**28}
#: Matrices of so many entries have norms that are a pass over them taken one by one on a CPU, without a copy.
ALONE_FROM = 2**17
#: Inner products of so many entries are a processor's library's, one by one; smaller ones are a product and a sum of all.
#: (Four of 384 x 128: 25 against 57 microseconds, of 128 x 128 13 against 10; a batched product of rows and columns: 400.)
DOT_FROM = 2**14


@dataclass(frozen=True)
class Source:
    """What the matrices of jobs are made of.

    Args:
        stacked: makes ``[jobs, *shape]``: this process's part of one tensor for each, all of one shape and one momentum. Of
            a replica's differences, which are made where whole gradients are: of the whole tensors.
        of_replica: whether it is what one replica's gradients differ by from those of the step, see :class:`Deviation`.
    """

    stacked: Callable[[Sequence[Job]], Tensor]
    of_replica: bool = False


def _unit_steps_go_along(jobs: Sequence[Job]) -> Tensor:
    """The average of the gradients, or Nesterov's look-ahead."""
    group = jobs[0].group
    if not group["nesterov"]:
        return stack_of(jobs, "momentum_buffer")
    averages, grads = state_and_gradients(jobs, "momentum_buffer")
    if len(grads) == 1:
        return torch.lerp(grads[0], averages[0], current_momentum(group)).view(len(jobs), *jobs[0].grad.shape)
    return stacked_by("lerp", grads, averages, current_momentum(group))


#: The gradients of the step, and what unit steps go along.
GRADIENTS, DIRECTIONS = Source(stack_of), Source(_unit_steps_go_along)
#: Whole tensors that were brought together.
_FETCHED = Source(lambda jobs: stacked([job.fetched for job in jobs if job.fetched is not None]))


@remember
def white_noise_factors(layout: Layout, geometry: Geometry, shape: tuple[int, ...]) -> tuple[float, ...]:
    """Per stack of the layout: one over the dual norm of white noise of unit deviation in its shape; 1 for an empty one."""
    return tuple(
        1.0 / geometry.white_noise_dual(d_out, d_in) if k * d_out * d_in else 1.0 for k, d_out, d_in in layout.shapes(shape)
    )


@checked
@dataclass(frozen=True)
class DualNorm:
    """A norm that a rate rule asks for: the dual norm of each unit of a tensor in the parameter's shape.

    Args:
        of: makes this process's part of the tensor from a parameter's :class:`Job`, when the work starts. A
            :class:`Source` makes those of many parameters in a few launches.
        geometry: whose norm; None: the parameter's own.
        per_white_noise: divided by the norm of white noise of unit deviation in that shape.
        seed: the rule's number of each unit that picks the probes where the norm is a stochastic estimate; None: the same
            probes at every step. A parameter's units take that of its first.

    Examples:
        >>> lw.DualNorm(lambda job: job.grad, lw.Frobenius()).geometry
        Frobenius()
    """

    of: Callable[[Job], Tensor] | Source
    geometry: Geometry | None = None
    per_white_noise: bool = False
    seed: str | None = None

    def asked_of(self, jobs: Sequence[Job]) -> list[MatrixJob]:
        """The work of it on parameters that are alike, in pieces of those that are worked on together."""
        group, param = jobs[0].group, jobs[0].param
        geometry, factors = self.geometry or group["geometry"], None
        if self.per_white_noise:
            factors = white_noise_factors(group["layout"], geometry, tuple(param.shape))
        make = self.of  # one by one
        source = make if isinstance(make, Source) else Source(lambda some: stacked([make(job) for job in some]))
        asked = MatrixJob(jobs, source, geometry, factors, self.seed)
        return asked.pieces(norms_at_once(asked))


@dataclass(frozen=True, slots=True)
class MatrixJob:
    """A dual norm, or a unit step, of each unit of one tensor in the shape of each of some parameters that are alike.

    Processes that share the work divide it by parameter.
    """

    jobs: Sequence[Job]
    source: Source  # of the tensors, made when the work starts, so that few are alive
    geometry: Geometry
    factors: tuple[float, ...] | None  # per stack of the layout: what a norm or a unit step is multiplied by
    seed: str | None = None  # of a norm's probes: a number in the parameters' state

    @property
    def param(self) -> Tensor:
        """The first of the parameters, or this process's part of it where that is all it works on."""
        return self.jobs[0].param

    @property
    def layout(self) -> Layout:
        layout: Layout = self.jobs[0].group["layout"]
        return layout

    @property
    def deviation(self) -> Deviation | None:
        """Where the work is on what one replica differs by: that of the first parameter."""
        return deviation_of(self.jobs[0]) if self.source.of_replica else None

    def part(self) -> Tensor:
        """What this process has to give to the work on one parameter: its part of the tensor, or of the step's gradient."""
        return self.jobs[0].grad if self.source.of_replica else self.source.stacked(self.jobs)[0]

    def of_fetched(self, whole: Tensor) -> MatrixJob:
        """The work on its one parameter, of which all parts were brought together."""
        source = self.source if self.source.of_replica else _FETCHED
        return replace(self, source=source, jobs=[replace(self.jobs[0], fetched=whole)])

    def pieces(self, at_once: int) -> list[MatrixJob]:
        """In order, each of at most so many parameters, as even as can be: threads share a batch."""
        pieces = -(-len(self.jobs) // at_once)
        if pieces == 1:
            return [self]
        cuts = pairwise(len(self.jobs) * i // pieces for i in range(pieces + 1))
        return [replace(self, jobs=self.jobs[start:end]) for start, end in cuts]


def deviation_of(job: Job) -> Deviation:
    """Raises LayerwiseError where the replicas are not watched."""
    if job.deviation is None:
        raise LayerwiseError(
            "noise reference 'replicas' compares the gradients of data-parallel processes: call "
            "optimizer.watch_replicas(model) with the DistributedDataParallel or fully_shard model before the first "
            "backward(), or, on one process, use reference='independent' (two halves of an accumulated batch) or 'previous'"
        )
    return job.deviation


@runtime_checkable
class MatrixWork(Protocol):
    """Where the work on whole matrices happens: the one object that distributed set-ups replace."""

    def norms(self, asked: Sequence[MatrixJob]) -> list[Tensor]:
        """The dual norm of every unit, ``[jobs, units]`` in float32 or better, for each that is asked, in order.

        Each is of as many parameters as are worked on together (``norms_at_once``).
        """

    def directions(self, asked: Sequence[MatrixJob]) -> Iterator[tuple[Sequence[Job], Sequence[Tensor]]]:
        """Some parameters at a time, in any order, with their unit steps times factors and multipliers, in their shapes.

        Each that is asked is of as many parameters as are worked on together (``directions_at_once``). Of a sharded
        parameter, the part that this process holds. Once all have been taken, the ``dual`` of every job that has one is
        filled in.
        """

    @property
    def anywhere(self) -> Anywhere | None:
        """What asks all processes; None: there is one."""

    def check_same(self, tensors: Sequence[Tensor], otherwise: str) -> None:
        """Raise :class:`LayerwiseError` with the message ``otherwise`` where processes hold different values of one that
        is not sharded. Waits for the device."""


def default_work() -> MatrixWork:
    """Over all processes where torch.distributed is initialised with more than one, else on this one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from layerwise.optim.work.distributed import DistributedWork

        return DistributedWork()
    return LocalWork()


class LocalWork:
    """Everything on this process: where it trains a model of its own, or alone.

    Examples:
        >>> optimizer.work = lw.LocalWork()  # doctest: +SKIP
    """

    anywhere: None = None

    def norms(self, asked: Sequence[MatrixJob]) -> list[Tensor]:
        found = []
        for job in asked:
            layout: Layout = job.jobs[0].group["layout"]
            count, stacks = len(job.jobs), layout.matrices_of(job.source.stacked(job.jobs))
            seed: int | Tensor = 0
            if job.seed is not None:  # [jobs, 1], whole numbers on the device: that of each parameter's first unit
                seed = stack_of(job.jobs, job.seed)[:, :1].long()
            norms = []
            for stack, factor in zip(stacks, job.factors or (1.0,) * len(stacks), strict=True):
                seeds = seed if isinstance(seed, int) else seed.expand(count, len(stack) // count).reshape(-1)
                norm = job.geometry.dual_norm(stack, seed=seeds)
                norms.append((norm if factor == 1.0 else norm * factor).reshape(count, -1))
            found.append(torch.cat(norms, dim=1))
            del stacks, stack  # before the next are made
        return found

    def directions(self, asked: Sequence[MatrixJob]) -> Iterator[tuple[Sequence[Job], Sequence[Tensor]]]:
        for job in asked:
            jobs = job.jobs
            layout: Layout = jobs[0].group["layout"]
            stacks = layout.matrices_of(job.source.stacked(jobs))
            steps = [job.geometry.lmo(stack) for stack in stacks]
            if jobs[0].dual is not None:
                _fill_dual_norms(jobs, stacks, steps)
            scales: Sequence[Tensor | float] = job.factors or (1.0,) * len(stacks)
            if "multiplier" in jobs[0].state:
                multipliers = stack_of(jobs, "multiplier")
                each = multipliers.split([len(stack) // len(jobs) for stack in stacks], 1)
                # in float32 at least: a multiplier rounded to bfloat16 would be off by up to 0.4 %
                scales = [
                    (own.to(torch.promote_types(step.dtype, torch.float32)) * factor).reshape(-1, 1, 1)
                    for own, step, factor in zip(each, steps, scales, strict=True)
                ]
            for step, scale in zip(steps, scales, strict=True):
                if isinstance(scale, Tensor) or scale != 1.0:
                    step.mul_(scale)
            found = layout.tensors_of(steps, jobs[0].param.shape, len(jobs)).unbind()
            del stacks, steps, step  # while the parameters move, only what they move along is there
            yield jobs, found

    def check_same(self, tensors: Sequence[Tensor], otherwise: str) -> None:
        """There is one process."""


def directions_at_once(job: MatrixJob) -> int:
    """Parameters whose unit steps are worked on together.

    On a CPU what stays in the cache; on a GPU small matrices only, as one large matrix fills it.
    """
    matrices, d_out, d_in = _size(job)
    if job.param.device.type == "cpu":
        size = torch.bfloat16.itemsize if PROCESSOR_UNITS else job.param.element_size()
        return max(1, matrices_at_once(d_out, d_in, size) // matrices)
    return norms_at_once(job) if min(d_out, d_in) < BATCH_BELOW else 1


def norms_at_once(job: MatrixJob) -> int:
    """A spectral norm is many small operations however large the matrix; what bounds a batch is that it is a copy.

    The others are few: on a CPU no large matrix is copied for them.
    """
    matrices, d_out, d_in = _size(job)
    if job.geometry.family != "spectral" and job.param.is_cpu and d_out * d_in >= ALONE_FROM:
        return 1
    on = "gpu" if job.param.device.type != "cpu" else "cpu with units" if PROCESSOR_UNITS else "cpu"
    return max(1, NORM_BYTES[on] // max(1, d_out * d_in * job.param.element_size()) // matrices)


def _size(job: MatrixJob) -> tuple[int, int, int]:
    """How many matrices a job has, at least 1, and the sides of the largest."""
    shapes = job.layout.shapes(job.param.shape)
    _, d_out, d_in = max((d_out * d_in, d_out, d_in) for _, d_out, d_in in shapes)
    return max(1, sum(k for k, _, _ in shapes)), d_out, d_in


def _fill_dual_norms(jobs: Sequence[Job], stacks: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    """From the matrices and their unit steps before those are scaled."""
    products = [inner_products(u, step) for u, step in zip(stacks, steps, strict=True)]
    found = products[0] if len(products) == 1 else torch.cat([some.view(len(jobs), -1) for some in products], dim=1)
    wanted = [job.dual for job in jobs if job.dual is not None]
    torch._foreach_copy_(wanted, found.view(len(jobs), -1).unbind())


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """``[k, m, n], [k, m, n] -> [k]``, in float32 at least."""
    if a.dtype.itemsize < 4:
        a, b = a.float(), b.float()
    k, rows, columns = a.shape
    if not a.is_cpu or rows * columns < DOT_FROM:
        return (a * b).sum((-2, -1))
    if a.stride(-1) != 1:
        a, b = a.mT, b.mT  # a unit step lies as its matrix does: neither is copied
    pairs = zip(a.reshape(k, -1).unbind(), b.reshape(k, -1).unbind(), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pairs])
