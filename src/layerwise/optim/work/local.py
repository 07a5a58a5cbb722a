"""The work on whole matrices where this process holds them all: equal shapes in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.geometry import Layout
from layerwise.geometry.spectral.newton_schulz import matrices_at_once
from layerwise.optim.work.job import Job, MatrixJob, MatrixWork, state_of, white_noise_factors

#: On a GPU a batch fills the device where one small matrix cannot; above this size one matrix does. Not yet measured
#: here: the Muon literature's number.
BATCH_BELOW = 1024
#: What a batch whose norms are taken may hold: on a GPU little beside a model, on a CPU what stays in the cache (with
#: 16 MiB the C library hands the memory back after every batch, and 8,000 to 20,000 page faults a step get it again).
NORM_BYTES = {"cpu": 2**23, "gpu": 2**28}
#: Inner products of so many entries are a processor's library's, one by one; smaller ones are a product and a sum of all.
#: (Four of 384 x 128: 25 against 57 microseconds, of 128 x 128 13 against 10; a batched product of rows and columns: 400.)
DOT_FROM = 2**14


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

    def norms(self, asked: Sequence[MatrixJob]) -> list[Tensor]:
        return [dual_norms(job) for job in asked]

    def directions(self, asked: Sequence[MatrixJob]) -> Iterator[tuple[Sequence[Job], Sequence[Tensor]]]:
        for job in asked:
            yield job.jobs, unit_steps(job)

    def anywhere(self, flags: Tensor) -> Tensor:
        return flags

    def check_same(self, tensors: Sequence[Tensor], otherwise: str) -> None:
        """There is one process."""


def directions_at_once(job: MatrixJob) -> int:
    """Parameters whose unit steps are worked on together.

    On a CPU what stays in the cache; on a GPU small matrices only, as one large matrix fills it.
    """
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


def unit_steps(asked: MatrixJob) -> Sequence[Tensor]:
    """Unit steps times factors and multipliers, in the parameters' shapes."""
    jobs = asked.jobs
    layout: Layout = jobs[0].group["layout"]
    stacks = layout.matrices_of(asked.tensors())
    steps = [asked.geometry.lmo(stack) for stack in stacks]
    if jobs[0].dual is not None:
        _fill_dual_norms(asked, stacks, steps)
    scales: Sequence[Tensor | float] = asked.factors or (1.0,) * len(stacks)
    if "multiplier" in jobs[0].state:
        multipliers = state_of(jobs, "multiplier")
        each = multipliers.split([len(stack) // len(jobs) for stack in stacks], 1)
        # in float32 at least: a multiplier rounded to bfloat16 would be off by up to 0.4 %
        scales = [
            (own.to(torch.promote_types(step.dtype, torch.float32)) * factor).reshape(-1, 1, 1)
            for own, step, factor in zip(each, steps, scales, strict=True)
        ]
    for step, scale in zip(steps, scales, strict=True):
        if isinstance(scale, Tensor) or scale != 1.0:
            step.mul_(scale)
    return layout.tensors_of(steps, jobs[0].param.shape, len(jobs)).unbind()


def _fill_dual_norms(asked: MatrixJob, stacks: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    """Over those of white noise, from the matrices and their unit steps before those are scaled."""
    factors = white_noise_factors(asked.layout, asked.geometry, tuple(asked.param.shape))
    products = [
        (_inner_products(u, step) * factor).reshape(len(asked.jobs), -1)
        for u, step, factor in zip(stacks, steps, factors, strict=True)
    ]
    wanted = [job.dual for job in asked.jobs if job.dual is not None]
    torch._foreach_copy_(wanted, torch.cat(products, dim=1).unbind())


def _inner_products(a: Tensor, b: Tensor) -> Tensor:
    """``[k, m, n], [k, m, n] -> [k]``, in float32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    if not a.is_cpu or a[0].numel() < DOT_FROM:
        return (a * b).sum((-2, -1))
    if a.stride(-1) != 1:
        a, b = a.mT, b.mT  # a unit step lies as its matrix does: neither is copied
    rows = zip(a.reshape(len(a), -1).unbind(), b.reshape(len(b), -1).unbind(), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in rows])


def dual_norms(asked: MatrixJob) -> Tensor:
    """``[jobs, units]``: the norm of each unit times the factor of its stack."""
    layout: Layout = asked.jobs[0].group["layout"]
    count, stacks = len(asked.jobs), layout.matrices_of(asked.tensors())
    seed: int | Tensor = 0
    if asked.seed is not None:  # [jobs, 1], whole numbers on the device: that of each parameter's first unit
        seed = state_of(asked.jobs, asked.seed)[:, :1].long()
    norms = []
    for stack, factor in zip(stacks, asked.factors or (1.0,) * len(stacks), strict=True):
        seeds = seed if isinstance(seed, int) else seed.expand(count, len(stack) // count).reshape(-1)
        norm = asked.geometry.dual_norm(stack, seed=seeds)
        norms.append((norm if factor == 1.0 else norm * factor).reshape(count, -1))
    return torch.cat(norms, dim=1)
