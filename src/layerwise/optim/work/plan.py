"""Who does which matrix, and in which order: pure functions of shapes, so that every process comes to the same plan."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache

from layerwise.geometry import Spectral
from layerwise.geometry.spectral.nuclear import ON_CPU, ON_GPU
from layerwise.optim.work.job import MatrixJob


def direction_cost(job: MatrixJob) -> int:
    """Multiply-adds of a job's unit steps, up to a common factor."""
    return sum(k * _polar_cost(*sorted(sides)) for k, *sides in _stacks(job))


def norm_cost(job: MatrixJob) -> int:
    """Multiply-adds of a job's dual norms, up to a common factor."""
    return sum(k * _nuclear_cost(job, *sorted(sides)) for k, *sides in _stacks(job))


def _stacks(job: MatrixJob) -> tuple[tuple[int, int, int], ...]:
    return job.layout.shapes(job.param.shape)


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
