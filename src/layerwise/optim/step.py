"""The phases of a step: momentum, layer rates, then directions with decay.

``keep``, where it is not None, is a 0-dimensional bool tensor on a device: where it is false nothing may change, and
gradients may hold anything, NaN included. So it selects values and never multiplies them (0 * nan is nan).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.optim import adamw
from layerwise.optim.groups.complete import Group, factors
from layerwise.optim.groups.options import check_gradient
from layerwise.optim.rules.rule import Deviation, Gradients, RateRule, Reading, State, UnitReadings, select
from layerwise.optim.work.job import MatrixJob, MatrixWork, local_part

#: Momentum of many small tensors goes in one launch; a chunk bounds the copies that `keep` makes.
CHUNK_BYTES = 64 * 2**20


class Job(NamedTuple):
    """One parameter that has a gradient at this step."""

    name: str
    param: Tensor
    local: Tensor  # this process's part of it: the parameter itself unless it is sharded
    grad: Tensor  # likewise
    group: Group
    state: State  # likewise
    deviation: Deviation | None = None  # where the replicas' own gradients are watched


def local_state(param: Tensor, state: State) -> State:
    """This process's part of the state, beside its parameter: frameworks move a model after the optimizer was made."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.device != param.device:
            state[key] = value.to(param.device)
    if local_part(param) is param:
        return state
    return {key: local_part(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def find_jobs(groups: Sequence[Group], states: Mapping[Tensor, State], work: MatrixWork) -> list[Job]:
    """The parameters that have a gradient on any process; where this one has none it stands for zero."""
    rows = [
        (name, param, group)
        for group in groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    ]
    here = [param.grad is not None for _, param, _ in rows]
    flags = torch.tensor(here)
    anywhere = work.anywhere(flags)
    jobs = []
    for (name, param, group), there in zip(
        rows, here if anywhere is flags else anywhere.tolist(), strict=True
    ):
        if there and param.numel():
            local = local_part(param)
            grad = torch.zeros_like(local) if param.grad is None else param.grad
            check_gradient(name, grad)
            jobs.append(Job(name, param, local, local_part(grad), group, states[param]))
    return jobs


def update_momentum(jobs: Sequence[Job], keep: Tensor | None) -> None:
    """``M <- momentum * M + (1 - momentum) * G``, in place."""
    for weight, chunk in _chunks(jobs):
        buffers = [job.state["momentum_buffer"] for job in chunk]
        # lerp from a number to itself changes nothing
        grads = [
            select(keep, job.grad.to(buffer.dtype), buffer)
            for job, buffer in zip(chunk, buffers, strict=True)
        ]
        torch._foreach_lerp_(buffers, grads, weight)


def _chunks(jobs: Sequence[Job]) -> Iterator[tuple[float, list[Job]]]:
    chunk: list[Job] = []
    size, weight = 0, 0.0
    for job in jobs:
        of_job = 1.0 - job.group["momentum"]
        if chunk and (of_job != weight or size > CHUNK_BYTES):
            yield weight, chunk
            chunk, size = [], 0
        weight = of_job
        chunk.append(job)
        size += job.grad.numel() * job.grad.element_size()
    if chunk:
        yield weight, chunk


def update_rates(
    jobs: Sequence[Job],
    groups: Sequence[Group],
    states: Mapping[Tensor, State],
    work: MatrixWork,
    keep: Tensor | None,
) -> None:
    """Measure what the rate rules ask for, and let each set the multipliers of every norm group."""
    adaptive = [(job, _gradients(job)) for job in jobs if job.group["rates"] is not None]
    wanted = [
        (job.param, _norm_job(job, reading))
        for job, gradients in adaptive
        for reading in job.group["rates"].readings(gradients, job.state)
    ]
    if wanted:
        read: dict[Tensor, list[Tensor]] = {}
        for (param, _), norms in zip(wanted, work.norms([matrix for _, matrix in wanted]), strict=True):
            read.setdefault(param, []).append(norms)
        for rule, params in _norm_groups(groups):
            units = [
                UnitReadings(states[p], torch.stack(read[p]) if p in read else None, group["momentum"])
                for p, group in params
            ]
            if any(unit.readings is not None for unit in units):
                rule.update(units, keep)
    for job, gradients in adaptive:
        job.group["rates"].remember(gradients, job.state, keep)


def _norm_groups(groups: Sequence[Group]) -> list[tuple[RateRule, list[tuple[Tensor, Group]]]]:
    """Each rule with the parameters whose units it compares with one another, those without a gradient too."""
    found: list[tuple[str, RateRule, list[tuple[Tensor, Group]]]] = []
    for group in groups:
        rule, name = group["rates"], group["norm_group"]
        if group["update"] != "lmo" or rule is None:
            continue
        members = [(param, group) for param in group["params"]]
        mates = next((m for other, r, m in found if other == name and (r is rule or r == rule)), None)
        if mates is None:
            found.append((name, rule, members))
        else:
            mates.extend(members)
    return [(rule, members) for _, rule, members in found]


def apply_directions(jobs: Sequence[Job], work: MatrixWork, keep: Tensor | None) -> None:
    """``W <- W - lr * weight_decay * W``, then ``W <- W - lr * multiplier * factor * lmo(u)``."""
    matrices = [
        MatrixJob(
            job.param,
            job.group["layout"],
            job.group["geometry"],
            _gradients(job).direction_input,
            factors(job.group, tuple(job.param.shape)),
            job.state.get("multiplier"),
        )
        for job in jobs
    ]
    for i, direction in work.directions(matrices):
        param, lr, decay = jobs[i].local, jobs[i].group["lr"], jobs[i].group["weight_decay"]
        if isinstance(lr, Tensor):
            lr = lr.reshape(())
        if decay != 0.0:
            param.mul_(_shrink(lr * decay, param, keep))
        if keep is not None:
            direction = select(keep, direction, 0.0)
        if isinstance(lr, Tensor):
            param.sub_(direction * lr)
        else:
            param.sub_(direction, alpha=lr)


def _shrink(amount: float | Tensor, param: Tensor, keep: Tensor | None) -> float | Tensor:
    # In float64 what is on the device comes out as the host's arithmetic does.
    return 1.0 - amount if keep is None else 1.0 - keep.to(param.device).double() * amount


def apply_adamw(jobs: Sequence[Job], keep: Tensor | None) -> None:
    """AdamW's whole step, group by group."""
    by_group: dict[int, list[Job]] = {}
    for job in jobs:
        by_group.setdefault(id(job.group), []).append(job)
    for members in by_group.values():
        adamw.step(
            [job.local for job in members],
            [job.grad for job in members],
            [job.state for job in members],
            members[0].group,
            keep,
        )


def _gradients(job: Job) -> Gradients:
    buffer, beta = job.state["momentum_buffer"], job.group["momentum"]

    def look_ahead() -> Tensor:
        return torch.lerp(job.grad.to(buffer.dtype), buffer, beta)

    def average() -> Tensor:
        return buffer

    ahead = look_ahead if job.group["nesterov"] else average
    return Gradients(job.grad, job.group["geometry"], buffer, ahead, beta, job.deviation)


def _norm_job(job: Job, reading: Reading) -> MatrixJob:
    geometry, layout = reading.geometry, job.group["layout"]
    scales = tuple(
        1.0 / geometry.white_noise_dual(d_out, d_in) if reading.per_white_noise and k * d_out * d_in else 1.0
        for k, d_out, d_in in layout.shapes(job.param.shape)
    )
    return MatrixJob(
        job.param,
        layout,
        geometry,
        reading.tensor,
        scales,
        seed=reading.seed,
        owner=reading.owner,
        finish=reading.finish,
    )
