"""Stacks of matrices that are cut between matrices, such as experts sharded along their first dimension.

Each process does the matrices it holds; nothing is sent but their norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from layerwise.common.tensors import local_part
from layerwise.geometry.layout import StackLayout, VectorStackLayout
from layerwise.optim.work.job import MatrixJob
from layerwise.optim.work.placement import Placed


def applies(job: MatrixJob, placed: Placed) -> bool:
    """Whether every matrix is whole on one process. (Replicas would repeat the work: there it is shared out instead.)"""
    whole = isinstance(job.layout, (StackLayout, VectorStackLayout)) and placed.dim == 0
    return whole and placed.domain.shards is not None and placed.domain.replicas is None


def own(job: MatrixJob, placed: Placed) -> MatrixJob:
    """The same job on this process's matrices alone."""
    units = list(own_units(job, placed))
    multiplier, dual = job.multiplier, job.dual
    if multiplier is not None:
        multiplier = torch.cat([multiplier[some] for some in units])
    if dual is not None:
        dual = replace(dual, values=torch.cat([dual.values[some] for some in units]))
    return replace(job, param=local_part(job.param), multiplier=multiplier, dual=dual)


def own_units(job: MatrixJob, placed: Placed) -> Iterator[slice]:
    """Where this process's units are among all units of the parameter, by stack of the layout."""
    lengths = [part[0] for part in placed.parts]
    first = sum(lengths[: placed.domain.shard])
    last, start = first + lengths[placed.domain.shard], 0
    for units, _, _ in job.layout.shapes(job.param.shape):
        each = units // job.param.shape[0]
        yield slice(start + first * each, start + last * each)
        start += units


def place_units(job: MatrixJob, placed: Placed, own_values: Tensor, values: Tensor) -> None:
    """Write the values of this process's units into those of all units, ``[units]``."""
    start = 0
    for units in own_units(job, placed):
        count = units.stop - units.start
        values[units] = own_values[start : start + count]
        start += count


def place_dual_norms(job: MatrixJob, placed: Placed, own_job: MatrixJob) -> None:
    """Write those that the job of this process's units has filled in where those of all units are."""
    if job.dual is not None and own_job.dual is not None:
        place_units(job, placed, own_job.dual.values, job.dual.values)
