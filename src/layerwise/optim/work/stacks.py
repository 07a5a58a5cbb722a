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
from layerwise.optim.work.routes import Task


def applies(task: Task) -> bool:
    """Whether every matrix is whole on one process. (Replicas would repeat the work: there it is shared out instead.)"""
    whole = isinstance(task.job.layout, (StackLayout, VectorStackLayout)) and task.placed.dim == 0
    return whole and task.placed.domain.shards is not None and task.placed.domain.replicas is None


def own(task: Task) -> Task:
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


def place_dual_norms(task: Task, own_task: Task) -> None:
    """Write those that the task of this process's units has filled in where those of all units are."""
    filled, wanted = own_task.job.jobs[0].dual, task.job.jobs[0].dual
    if filled is not None and wanted is not None:
        place_units(task, filled, wanted)
