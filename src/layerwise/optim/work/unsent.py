"""Work for which no matrix is sent: on entries where they are, and on matrices that one process holds whole.

**Entrywise** geometries need no whole matrix: each process does its own shard, with one number a matrix exchanged at most.
Jobs are of one parameter each. With c the size of the entries of a unit step (``Geometry.unit_rms``) and N their number, on
one matrix of N entries

    sign             dual norm c * ||g||_1            unit step c * sign(g)
    Euclidean        dual norm c sqrt(N) * ||g||_2    unit step c sqrt(N) * g / ||g||_2

**Stacks** of matrices that are cut between matrices, such as experts sharded along their first dimension: each process does
the matrices it holds, and nothing is sent but their norms.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from layerwise.common.tensors import local_part
from layerwise.geometry.layout import StackLayout, VectorStackLayout
from layerwise.geometry.spectral.newton_schulz import working_dtype
from layerwise.optim.work.local import MatrixJob
from layerwise.optim.work.placement import Domain
from layerwise.optim.work.routes import Task, all_gather

#: The order p of the norm of all entries that a family's dual norm is a multiple of.
ORDER: Final = {"sign": 1, "frobenius": 2, "vector_rms": 2}


def is_entrywise(job: MatrixJob) -> bool:
    """Whether this job can be done shard by shard: its geometry is entrywise, and the parameter is one unit."""
    return job.geometry.family in ORDER and job.layout.count(job.param.shape) == 1


def dual_norms(domain: Domain, jobs: Sequence[MatrixJob]) -> Callable[[], list[Tensor]]:
    """The dual norm ``[1]`` of each job, times its factor; calling the result waits for it."""
    lengths = _lengths(domain, jobs)
    return lambda: [_dual_norm(job, length, job.factors) for job, length in zip(jobs, lengths(), strict=True)]


def unit_steps(domain: Domain, jobs: Sequence[MatrixJob]) -> Generator[None, None, list[Tensor]]:
    """This process's part of each job's unit step, times its factor and multiplier; yields once when it has sent.

    Dual norms that are wanted beside them are filled in.
    """
    measured = [i for i, job in enumerate(jobs) if ORDER[job.geometry.family] == 2 or job.jobs[0].dual is not None]
    lengths = _lengths(domain, [jobs[i] for i in measured])
    yield
    known = dict(zip(measured, lengths(), strict=True))
    for i, length in known.items():
        if (dual := jobs[i].jobs[0].dual) is not None:
            dual.copy_(_dual_norm(jobs[i], length, None))
    return [_unit_step(job, known.get(i)) for i, job in enumerate(jobs)]


def _dual_norm(job: MatrixJob, length: Tensor, factors: tuple[float, ...] | None) -> Tensor:
    return (length * _scale(job) * (factors or (1.0,))[0]).to(working_dtype(job.param)).reshape(1)


def _unit_step(job: MatrixJob, length: Tensor | None) -> Tensor:
    tensor = job.part()
    scale = torch.full((), _scale(job) * (job.factors or (1.0,))[0], dtype=torch.float64, device=tensor.device)
    if "multiplier" in job.jobs[0].state:
        scale = scale * job.jobs[0].state["multiplier"][0]
    if length is None or ORDER[job.geometry.family] == 1:
        return torch.sign(tensor).mul_(scale.to(tensor.dtype))
    # Twice by the root: the length of tiny gradients has a reciprocal beyond float32.
    root = torch.where(length > 0, length, 1.0).rsqrt()
    working = tensor.to(working_dtype(tensor))
    return (working * root.to(working.dtype) * (root * scale).to(working.dtype)).to(tensor.dtype)


def _scale(job: MatrixJob) -> float:
    ((_, d_out, d_in),) = job.layout.shapes(job.param.shape)
    size = job.geometry.unit_rms(d_out, d_in)
    return size if ORDER[job.geometry.family] == 1 else size * float(d_out * d_in) ** 0.5


def _lengths(domain: Domain, jobs: Sequence[MatrixJob]) -> Callable[[], list[Tensor]]:
    """The norm of all entries of each whole tensor, in float64: squares of float32 entries stay in its range."""
    if not jobs:
        return list
    assert domain.shards is not None
    orders = [ORDER[job.geometry.family] for job in jobs]
    mine = torch.stack(
        [torch.linalg.vector_norm(job.part(), order, dtype=torch.float64) for job, order in zip(jobs, orders, strict=True)]
    )
    pending = all_gather(domain.shards, [mine], [[(len(jobs),)]] * domain.shard_count, mine)

    def wait() -> list[Tensor]:
        parts = torch.stack([given[0] for given in pending()])
        return [torch.linalg.vector_norm(parts[:, i], order) for i, order in enumerate(orders)]

    return wait


def is_held(task: Task) -> bool:
    """Whether every matrix is whole on one process. (Replicas would repeat the work: there it is shared out instead.)"""
    domain, stacked = task.placed.domain, isinstance(task.job.layout, (StackLayout, VectorStackLayout))
    cut_between = stacked and task.placed.dim == 0 and domain.shards is not None
    return cut_between and domain.replicas is None and task.job.deviation is None


def own_matrices(task: Task) -> Task:
    """The same task on this process's matrices alone."""
    (job,) = task.job.jobs
    units, state, dual = list(own_units(task)), job.state, job.dual
    if "multiplier" in state:
        state = {**state, "multiplier": torch.cat([state["multiplier"][some] for some in units])}
    if dual is not None:
        dual = torch.cat([dual[some] for some in units])
    part = replace(job, param=local_part(job.param), state=state, dual=dual)
    return replace(task, job=replace(task.job, jobs=[part]))


def own_units(task: Task) -> Iterator[slice]:
    """Where this process's units are among all units of the parameter, by stack of the layout."""
    lengths, shard = [part[0] for part in task.placed.parts], task.placed.domain.shard
    first = sum(lengths[:shard])
    last, start, shape = first + lengths[shard], 0, task.job.param.shape
    for units, _, _ in task.job.layout.shapes(shape):
        each = units // shape[0]
        yield slice(start + first * each, start + last * each)
        start += units


def place_units(task: Task, own_values: Tensor, values: Tensor) -> None:
    """Write the values of this process's units into those of all units, ``[units]``."""
    start = 0
    for units in own_units(task):
        count = units.stop - units.start
        values[units] = own_values[start : start + count]
        start += count
