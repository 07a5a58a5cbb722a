"""The middle phase of a step: the work on whole matrices, apart from the update rule.

The optimizer says what it wants (a norm of each unit, a unit step per unit); where and in which batches that is computed
is decided here. A distributed set-up replaces this object and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.geometry import Geometry, Layout
from layerwise.geometry.newton_schulz import matrices_at_once

#: On a GPU a batch fills the device where one small matrix cannot; above this size one matrix does. Not yet measured
#: here: the Muon literature's number.
BATCH_BELOW = 1024
#: What a batch whose norms are taken may hold: on a GPU little beside a model, on a CPU what stays in the cache (with
#: 16 MiB the C library hands the memory back after every batch, and 8,000 to 20,000 page faults a step get it again).
NORM_BYTES = {"cpu": 2**23, "gpu": 2**28}


@dataclass(frozen=True)
class MatrixJob:
    """Work on the units of one parameter-shaped tensor."""

    param: Tensor
    layout: Layout
    geometry: Geometry
    tensor: Callable[
        [], Tensor
    ]  # this process's part of it; made when the work starts, so that few are alive
    factors: tuple[float, ...]  # per stack of the layout: what a norm or a unit step is multiplied by
    multiplier: Tensor | None = None  # [units]: what a unit step is multiplied by as well
    seed: int | Tensor = 0  # of the probes, where a norm is a stochastic estimate
    owner: int | None = None  # number of the process that has to do it, where only one can
    finish: Callable[[Tensor], Tensor] | None = (
        None  # from the whole tensor to the one worked on; on the owner
    )

    def whole(self) -> Tensor:
        """The tensor to work on, where this process holds all of it."""
        return self.tensor() if self.finish is None else self.finish(self.tensor())


class MatrixWork(Protocol):
    """Where the work on whole matrices happens."""

    def norms(self, jobs: Sequence[MatrixJob]) -> list[Tensor]:
        """The dual norm of every unit, ``[units]`` in float32 or better, for each job in order."""

    def directions(self, jobs: Sequence[MatrixJob]) -> Iterator[tuple[int, Tensor]]:
        """``(index of the job, its unit step times its factors in the parameter's shape)``, in any order.

        Of a sharded parameter, the part that this process holds.
        """

    def anywhere(self, flags: Tensor) -> Tensor:
        """``flags`` (bool, any device), true where they are true on any process that takes this step."""

    def check_same(self, tensors: Sequence[Tensor], otherwise: str) -> None:
        """Raise :class:`LayerwiseError` with the message ``otherwise`` where processes hold different values of one that
        is not sharded. Waits for the device."""


class LocalWork:
    """Everything on this process, equal shapes in batches."""

    def norms(self, jobs: Sequence[MatrixJob]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for batch in batches(jobs, norms_at_once):
            if len(batch) == 1:
                found[batch[0]] = self._norm(jobs[batch[0]])
            else:
                found |= self._batched_norms(jobs, batch)
        return [found[i] for i in range(len(jobs))]

    def directions(self, jobs: Sequence[MatrixJob]) -> Iterator[tuple[int, Tensor]]:
        for batch in batches(jobs, directions_at_once):
            if len(batch) == 1:
                yield batch[0], unit_steps(jobs[batch[0]])
            else:
                yield from self._batched(jobs, batch)

    def anywhere(self, flags: Tensor) -> Tensor:
        return flags

    def check_same(self, tensors: Sequence[Tensor], otherwise: str) -> None:
        """There is one process."""

    @staticmethod
    def _norm(job: MatrixJob) -> Tensor:
        stacks = zip(job.layout.to_matrices(job.whole()), job.factors, strict=True)
        return torch.cat([job.geometry.dual_norm(stack, seed=job.seed) * factor for stack, factor in stacks])

    @staticmethod
    def _batched_norms(jobs: Sequence[MatrixJob], batch: Sequence[int]) -> dict[int, Tensor]:
        together, sizes = _together(jobs, batch)
        seeds = [
            torch.as_tensor(jobs[i].seed, device=together.device).expand(k)
            for i, k in zip(batch, sizes, strict=True)
        ]
        duals = jobs[batch[0]].geometry.dual_norm(together, seed=torch.cat(seeds))
        return {i: dual * jobs[i].factors[0] for i, dual in zip(batch, duals.split(sizes), strict=True)}

    @staticmethod
    def _batched(jobs: Sequence[MatrixJob], batch: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        geometry, factor = jobs[batch[0]].geometry, jobs[batch[0]].factors[0]
        together, sizes = _together(jobs, batch)
        for i, steps in zip(batch, geometry.lmo(together).split(sizes), strict=True):
            _scale(steps, factor, jobs[i].multiplier)
            yield i, jobs[i].layout.from_matrices((steps,), jobs[i].param.shape)


def _together(jobs: Sequence[MatrixJob], batch: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The matrices of a batch in one stack, and how many are of each job."""
    stacks = [jobs[i].layout.to_matrices(jobs[i].whole())[0] for i in batch]
    return torch.cat(stacks), [stack.shape[0] for stack in stacks]


def default_work() -> MatrixWork:
    """Over all processes where torch.distributed is initialised with more than one, else on this one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from layerwise.optim.work.distributed import DistributedWork

        return DistributedWork()
    return LocalWork()


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)  # torch.distributed.tensor is slow to import
    return tensor if to_local is None else to_local()


def unit_steps(job: MatrixJob) -> Tensor:
    """The unit steps of one job, times its factors and multiplier, in the parameter's shape."""
    steps = [job.geometry.lmo(stack) for stack in job.layout.to_matrices(job.tensor())]
    sizes = [stack.shape[0] for stack in steps]
    multipliers = job.multiplier.split(sizes) if job.multiplier is not None else [None] * len(sizes)
    for stack, factor, multiplier in zip(steps, job.factors, multipliers, strict=True):
        _scale(stack, factor, multiplier)
    return job.layout.from_matrices(steps, job.param.shape)


def _scale(steps: Tensor, factor: float, multiplier: Tensor | None) -> None:
    if multiplier is not None:
        # in float32 at least: a multiplier rounded to bfloat16 would be off by up to 0.4 %
        scale = multiplier.to(torch.promote_types(steps.dtype, torch.float32)) * factor
        steps.mul_(scale[:, None, None])
    elif factor != 1.0:
        steps.mul_(factor)


def batches(jobs: Sequence[MatrixJob], at_once: Callable[[MatrixJob], int]) -> list[list[int]]:
    """Indices of jobs that are worked on together: alike in everything, up to ``at_once`` of their matrices."""
    together: dict[object, list[list[int]]] = {}
    held: dict[object, int] = {}
    for i, job in enumerate(jobs):
        shapes = job.layout.shapes(job.param.shape)
        key: object = i
        if len(shapes) == 1:
            key = (job.geometry, shapes[0][1:], job.factors, job.param.dtype, job.param.device)
        size = sum(k for k, _, _ in shapes)
        found = together.setdefault(key, [])
        if not found or held[key] + size > at_once(job):
            found.append([])
            held[key] = 0
        found[-1].append(i)
        held[key] += size
    return [batch for found in together.values() for batch in found]


def directions_at_once(job: MatrixJob) -> int:
    """On a CPU what stays in the cache; on a GPU small matrices only, as one large matrix fills it."""
    _, d_out, d_in = job.layout.shapes(job.param.shape)[0]
    if job.param.device.type == "cpu":
        return matrices_at_once(d_out, d_in, job.param.element_size())
    return norms_at_once(job) if min(d_out, d_in) < BATCH_BELOW else 1


def norms_at_once(job: MatrixJob) -> int:
    """A norm is many small operations however large the matrix; what bounds a batch is that it is a copy."""
    _, d_out, d_in = job.layout.shapes(job.param.shape)[0]
    limit = NORM_BYTES["cpu" if job.param.device.type == "cpu" else "gpu"]
    return max(1, limit // max(1, d_out * d_in * job.param.element_size()))
