"""The work on whole matrices where this process holds them all: equal shapes in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from layerwise.geometry.spectral.newton_schulz import matrices_at_once
from layerwise.optim.work.job import MatrixJob

#: On a GPU a batch fills the device where one small matrix cannot; above this size one matrix does. Not yet measured
#: here: the Muon literature's number.
BATCH_BELOW = 1024
#: What a batch whose norms are taken may hold: on a GPU little beside a model, on a CPU what stays in the cache (with
#: 16 MiB the C library hands the memory back after every batch, and 8,000 to 20,000 page faults a step get it again).
NORM_BYTES = {"cpu": 2**23, "gpu": 2**28}


class LocalWork:
    """Everything on this process: where it trains a model of its own, or alone.

    Examples:
        >>> optimizer.work = lw.LocalWork()  # doctest: +SKIP
    """

    def norms(self, jobs: Sequence[MatrixJob]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for batch in batches(jobs, norms_at_once):
            if len(batch) == 1:
                found[batch[0]] = _norms(jobs[batch[0]])
            else:
                found |= zip(batch, _norms_together([jobs[i] for i in batch]), strict=True)
        return [found[i] for i in range(len(jobs))]

    def directions(self, jobs: Sequence[MatrixJob]) -> Iterator[tuple[int, Tensor]]:
        for batch in batches(jobs, directions_at_once):
            # Not `yield from zip(...)`: torch.compile of 2.14 fails where that ends (Python 3.13).
            for i, step in zip(batch, unit_steps([jobs[i] for i in batch]), strict=True):  # noqa: UP028
                yield i, step

    def anywhere(self, flags: Tensor) -> Tensor:
        return flags

    def check_same(self, tensors: Sequence[Tensor], otherwise: str) -> None:
        """There is one process."""


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


def unit_steps(jobs: Sequence[MatrixJob]) -> list[Tensor]:
    """Of one job, or of several alike together: unit steps times factors and multipliers, in the parameters' shapes."""
    lmo, given = jobs[0].geometry.lmo, [job.stacks() for job in jobs]
    if len(jobs) == 1:
        stepped = [[lmo(stack) for stack in given[0]]]
    else:
        together = lmo(torch.cat([stack for (stack,) in given]))
        stepped = [[part] for part in together.split([stack.shape[0] for (stack,) in given])]
    for job, stacks, steps in zip(jobs, given, stepped, strict=True):
        if job.dual is not None:
            job.dual.fill(stacks, steps)
        _scale(steps, job)
    return [
        job.layout.from_matrices(steps, job.param.shape) for job, steps in zip(jobs, stepped, strict=True)
    ]


def _scale(steps: Sequence[Tensor], job: MatrixJob) -> None:
    """In place: by the factor of each stack, and by the multiplier of each unit."""
    if job.multiplier is None:
        for stack, factor in zip(steps, job.factors, strict=True):
            if factor != 1.0:
                stack.mul_(factor)
        return
    multipliers = job.multiplier.split([stack.shape[0] for stack in steps])
    for stack, factor, multiplier in zip(steps, job.factors, multipliers, strict=True):
        # in float32 at least: a multiplier rounded to bfloat16 would be off by up to 0.4 %
        scale = multiplier.to(torch.promote_types(stack.dtype, torch.float32)) * factor
        stack.mul_(scale[:, None, None])


def _norms(job: MatrixJob) -> Tensor:
    stacks = zip(job.stacks(), job.factors, strict=True)
    return torch.cat([job.geometry.dual_norm(stack, seed=job.seed) * factor for stack, factor in stacks])


def _norms_together(jobs: Sequence[MatrixJob]) -> list[Tensor]:
    """Of jobs that are alike, in one stack."""
    stacks = [job.stacks()[0] for job in jobs]
    together, sizes = torch.cat(stacks), [stack.shape[0] for stack in stacks]
    seeds = [
        torch.as_tensor(job.seed, device=together.device).expand(k)
        for job, k in zip(jobs, sizes, strict=True)
    ]
    duals = jobs[0].geometry.dual_norm(together, seed=torch.cat(seeds))
    return [dual * job.factors[0] for job, dual in zip(jobs, duals.split(sizes), strict=True)]
