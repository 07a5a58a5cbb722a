"""The work on whole matrices where this process holds them all: equal shapes in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from layerwise.geometry.spectral.newton_schulz import matrices_at_once
from layerwise.optim.work.job import MatrixJob, stacked

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
            found |= zip(batch, dual_norms([jobs[i] for i in batch]), strict=True)
        return [found[i] for i in range(len(jobs))]

    def directions(self, jobs: Sequence[MatrixJob]) -> Iterator[list[tuple[int, Tensor]]]:
        for batch in batches(jobs, directions_at_once):
            yield list(zip(batch, unit_steps([jobs[i] for i in batch]), strict=True))

    def anywhere(self, flags: Tensor) -> Tensor:
        return flags

    def check_same(self, tensors: Sequence[Tensor], otherwise: str) -> None:
        """There is one process."""


def batches(jobs: Sequence[MatrixJob], at_once: Callable[[MatrixJob], int]) -> list[list[int]]:
    """Indices of jobs that are worked on together: alike in everything, up to ``at_once`` of them."""
    by_group: dict[object, list[int]] = {}
    for i, job in enumerate(jobs):
        # by identity first: to hash a geometry and a layout for each of many parameters would take longer than their work
        ids = (
            id(job.job.group),
            id(job.geometry),
            id(job.source),
            job.fetched is None,
            job.multiplier is None,
        )
        by_group.setdefault((ids, job.param.shape, job.param.dtype, job.param.device), []).append(i)
    together: dict[object, list[int]] = {}
    for members in by_group.values():
        job = jobs[members[0]]
        group, param, source = job.job.group, job.param, None if job.by_itself else job.source
        kind = (
            *(job.layout, job.geometry, job.factors, source, group["momentum"], group["nesterov"]),
            *(param.shape, param.dtype, param.device),
            *(job.multiplier is None, job.dual is None, getattr(job.seed, "shape", None)),
        )
        together.setdefault(kind, []).extend(members)
    found = []
    for members in together.values():
        size = at_once(jobs[members[0]])
        found += [members[start : start + size] for start in range(0, len(members), size)]
    return found


def directions_at_once(job: MatrixJob) -> int:
    """On a CPU what stays in the cache; on a GPU small matrices only, as one large matrix fills it."""
    matrices, d_out, d_in = _size(job)
    if job.param.device.type == "cpu":
        return max(1, matrices_at_once(d_out, d_in, job.param.element_size()) // matrices)
    return norms_at_once(job) if min(d_out, d_in) < BATCH_BELOW else 1


def norms_at_once(job: MatrixJob) -> int:
    """A norm is many small operations however large the matrix; what bounds a batch is that it is a copy."""
    matrices, d_out, d_in = _size(job)
    limit = NORM_BYTES["cpu" if job.param.device.type == "cpu" else "gpu"]
    return max(1, limit // max(1, d_out * d_in * job.param.element_size()) // matrices)


def _size(job: MatrixJob) -> tuple[int, int, int]:
    """How many matrices a job has, at least 1, and the sides of the largest."""
    shapes = job.layout.shapes(job.param.shape)
    _, d_out, d_in = max((d_out * d_in, d_out, d_in) for _, d_out, d_in in shapes)
    return max(1, sum(k for k, _, _ in shapes)), d_out, d_in


def _matrices(jobs: Sequence[MatrixJob]) -> tuple[Tensor, ...]:
    """Of jobs that are alike: a stack for each of the layout's, those of the first job first."""
    if jobs[0].by_itself:
        return jobs[0].layout.matrices_of(stacked([job.whole() for job in jobs]))
    return jobs[0].layout.matrices_of(jobs[0].source.stacked([job.job for job in jobs]))


def unit_steps(jobs: Sequence[MatrixJob]) -> Sequence[Tensor]:
    """Of jobs that are alike: unit steps times factors and multipliers, in the parameters' shapes."""
    first, count = jobs[0], len(jobs)
    stacks = _matrices(jobs)
    steps = [first.geometry.lmo(stack) for stack in stacks]
    if first.dual is not None:
        _fill_dual_norms(jobs, stacks, steps)
    factors = first.factors or (1.0,) * len(stacks)
    if first.multiplier is None:
        scales: Sequence[Tensor | float] = factors
    else:
        each = [len(stack) // count for stack in stacks]
        multipliers = stacked([job.multiplier for job in jobs if job.multiplier is not None]).split(each, 1)
        # in float32 at least: a multiplier rounded to bfloat16 would be off by up to 0.4 %
        scales = [
            (own.to(torch.promote_types(step.dtype, torch.float32)) * factor).reshape(-1, 1, 1)
            for own, step, factor in zip(multipliers, steps, factors, strict=True)
        ]
    for step, scale in zip(steps, scales, strict=True):
        if isinstance(scale, Tensor) or scale != 1.0:
            step.mul_(scale)
    return first.layout.tensors_of(steps, first.param.shape, count).unbind()


def _fill_dual_norms(jobs: Sequence[MatrixJob], stacks: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    """From the matrices and their unit steps, before those are scaled."""
    duals = [job.dual for job in jobs if job.dual is not None]
    products = [
        (_inner_products(u, step) * factor).reshape(len(duals), -1)
        for u, step, factor in zip(stacks, steps, duals[0].factors, strict=True)
    ]
    torch._foreach_copy_([dual.values for dual in duals], torch.cat(products, dim=1).unbind())


def _inner_products(a: Tensor, b: Tensor) -> Tensor:
    """``[k, m, n], [k, m, n] -> [k]``, each in one pass over the matrices."""
    if a.dtype == torch.float16:  # a product of entries could leave its range
        a, b = a.float(), b.float()
    return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1)).reshape(len(a))


def dual_norms(jobs: Sequence[MatrixJob]) -> Sequence[Tensor]:
    """Of jobs that are alike: the norm of each unit times the factor of its stack."""
    first, count = jobs[0], len(jobs)
    stacks = _matrices(jobs)
    seeds = _seeds(jobs, stacks[0].device)
    norms = [
        first.geometry.dual_norm(stack, seed=seeds.expand(count, len(stack) // count).reshape(-1))
        for stack in stacks
    ]
    if first.factors is not None:
        norms = [norm * factor for norm, factor in zip(norms, first.factors, strict=True)]
    return torch.cat([norm.reshape(count, -1) for norm in norms], dim=1).unbind()


def _seeds(jobs: Sequence[MatrixJob], device: torch.device) -> Tensor:
    """``[jobs, 1]``, whole numbers on the device."""
    given = [job.seed for job in jobs if isinstance(job.seed, Tensor)]
    if given:
        return stacked(given).reshape(len(jobs), -1)[:, :1].long()
    return torch.tensor([[job.seed] for job in jobs], device=device)
