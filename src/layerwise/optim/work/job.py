"""The two records of a step: a parameter at that step, and the work on the matrices of one tensor of its shape.

Both are made once a step. The optimizer makes a :class:`Job` of each parameter, and gives it to the guard, to the rate
rules and to the kinds of update. Those make a :class:`MatrixJob` where they need a norm or a unit step of each unit. What
the matrices of many jobs come from, a :class:`Source` makes together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from layerwise.common.remember import remember
from layerwise.common.tensors import dense, is_sharded, local_part
from layerwise.geometry import Geometry, Layout

State = dict[str, Any]
Group = dict[str, Any]

_NO_GRADIENT = torch.empty(0)


def local_state(param: Tensor, state: State) -> State:
    """This process's part of the state."""
    if not is_sharded(param):
        return state
    return {key: local_part(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def rate(group: Group) -> float | Tensor:
    """The learning rate of a group's steps: its ``lr``, times its ``lr_scale`` where it has one."""
    lr: float | Tensor = group["lr"]
    scale = group.get("lr_scale", 1.0)
    return lr if scale == 1.0 else lr * scale


def select(keep: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """``new`` where ``keep`` allows it, else ``old``: a choice and no product, so that NaN cannot pass."""
    return new if keep is None else torch.where(keep.to(new.device), new, old)


def select_all(keep: Tensor, new: list[Tensor], old: Sequence[Tensor | float]) -> list[Tensor]:
    """:func:`select` for many tensors, in the dtype of ``old``: one choice for all of a shape, so few launches."""
    by_shape: dict[object, list[int]] = {}
    for i, tensor in enumerate(new):
        by_shape.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(i)
    chosen = list(new)
    for alike in by_shape.values():
        before = [old[i] for i in alike]
        values, tensors = stacked([new[i] for i in alike]), [b for b in before if isinstance(b, Tensor)]
        if tensors:
            values = values.to(tensors[0].dtype)
        together = select(keep, values, stacked(tensors) if tensors else before[0])
        for i, tensor in zip(alike, together.unbind(), strict=True):
            chosen[i] = tensor
    return chosen


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """``[n, ...]``: a copy, and of one tensor a view."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


class Deviation(NamedTuple):
    """What one replica's gradient of a parameter differs by from the mean over all replicas, the gradient of the step."""

    owner: int  # number of the process that kept its own gradient
    replicas: int
    kept: Tensor | None  # that gradient, on the owner alone; None: no backward pass reached it there
    scale: Tensor | float  # what gradients were multiplied by since

    def from_mean(self, mean: Tensor) -> Tensor:
        """Own gradient minus mean, scaled to the noise of the difference of two gradients; on the owner."""
        own = -mean
        if self.kept is not None:
            own = torch.sub(self.kept.to(mean.device, mean.dtype) * self.scale, mean)
        return own * (2 / (self.replicas - 1)) ** 0.5


@dataclass(slots=True)
class Job:
    """One parameter at one step. Tensors are this process's parts, of ``param`` itself unless it is sharded."""

    name: str
    param: Tensor  # as its group holds it: a DTensor where it is sharded
    local: Tensor
    grad: Tensor  # zeros where another process alone has one; without `moves`, empty
    moves: bool  # whether any process has a gradient; else the parameter is left alone
    group: Group
    state: State
    lr: float | Tensor  # of this step: that of its group, times the group's lr_scale
    deviation: Deviation | None = None  # where the replicas' own gradients are watched

    def norm(
        self,
        tensor: Callable[[], Tensor] | Source,
        geometry: Geometry | None = None,
        *,
        per_white_noise: bool = False,
        seed: int | Tensor = 0,
        deviation: Deviation | None = None,
    ) -> MatrixJob:
        """Ask for the dual norm of each unit of a tensor in the parameter's shape.

        Args:
            tensor: makes this process's part of it, when the work starts. A :class:`Source` makes those of many parameters
                of a shape in a few launches.
            geometry: whose norm; None: the parameter's own.
            per_white_noise: divided by the norm of white noise of unit deviation in that shape.
            seed: of the probes, where the norm is a stochastic estimate: one for all units, or ``[units]`` of which the
                first is taken.
            deviation: take the norm of this replica's difference from ``tensor``, the mean of all.
        """
        layout, own, factors = self.group["layout"], geometry or self.group["geometry"], None
        if per_white_noise:
            factors = white_noise_factors(layout, own, tuple(self.param.shape))
        source = _OneTensor(tensor) if callable(tensor) else tensor
        return MatrixJob(self, self.param, layout, own, source, factors, seed=seed, deviation=deviation)


def jobs_of(groups: Sequence[Group], states: Mapping[Tensor, State], work: MatrixWork) -> list[Job]:
    """One of each parameter. Where another process has a gradient and this one has none, it stands for zero."""
    here = [param.grad is not None for group in groups for param in group["params"]]
    flags = torch.tensor(here)
    anywhere = work.anywhere(flags)
    moving = iter(here if anywhere is flags else anywhere.tolist())
    jobs = []
    for group in groups:
        lr = rate(group)
        for name, param in zip(group["param_names"], group["params"], strict=True):
            local, grad = local_part(param), param.grad
            moves = next(moving) and param.numel() > 0
            if not moves:
                grad = _NO_GRADIENT
            elif grad is None:
                grad = torch.zeros_like(local)
            else:
                grad = local_part(dense(name, grad))
            jobs.append(Job(name, param, local, grad, moves, group, local_state(param, states[param]), lr))
    return jobs


def by_group(jobs: Iterable[Job]) -> list[list[Job]]:
    """Those of each parameter group together; jobs come group by group."""
    return [list(members) for _, members in groupby(jobs, lambda job: id(job.group))]


class Source(ABC):
    """What the matrices of jobs are made of. Equal ones (a frozen dataclass is equal by its fields) work together."""

    #: whether it is of one parameter alone
    alone: ClassVar[bool] = False

    @abstractmethod
    def stacked(self, jobs: Sequence[Job]) -> Tensor:
        """``[jobs, *shape]``: this process's part of one tensor for each, all of one shape and with one momentum."""


@dataclass(frozen=True, eq=False)
class _OneTensor(Source):
    """Of one parameter alone."""

    make: Callable[[], Tensor]
    alone: ClassVar = True

    def stacked(self, jobs: Sequence[Job]) -> Tensor:
        return self.make()[None]


@dataclass(frozen=True)
class Gradients(Source):
    """The gradients of the step."""

    def stacked(self, jobs: Sequence[Job]) -> Tensor:
        return stacked([job.grad for job in jobs])


@dataclass(frozen=True)
class Directions(Source):
    """What unit steps go along: the average of the gradients, or Nesterov's look-ahead."""

    def stacked(self, jobs: Sequence[Job]) -> Tensor:
        averages = stacked([job.state["momentum_buffer"] for job in jobs])
        group = jobs[0].group
        if not group["nesterov"]:
            return averages
        return torch.lerp(stacked([job.grad for job in jobs]).to(averages.dtype), averages, group["momentum"])


GRADIENTS, DIRECTIONS = Gradients(), Directions()


@remember
def white_noise_factors(layout: Layout, geometry: Geometry, shape: tuple[int, ...]) -> tuple[float, ...]:
    """Per stack of the layout: one over the dual norm of white noise of unit deviation in its shape; 1 for an empty one."""
    return tuple(
        1.0 / geometry.white_noise_dual(d_out, d_in) if k * d_out * d_in else 1.0
        for k, d_out, d_in in layout.shapes(shape)
    )


@dataclass(frozen=True, slots=True)
class DualNorms:
    """Where the dual norm of each unit goes that its unit step gives on the way: ``||u||_* = <u, lmo(u)>``."""

    values: Tensor  # [units], float32 or better: 0 until the work has filled it in, on every process
    factors: tuple[float, ...]  # per stack of the layout: what a norm is multiplied by


@dataclass(slots=True)  # frozen, it would take three times as long to make
class MatrixJob:
    """A dual norm, or a unit step, of each unit of one tensor in a parameter's shape. Never changed."""

    job: Job
    param: Tensor  # the job's, or this process's part of it where that is all it works on
    layout: Layout
    geometry: Geometry
    source: Source  # of this process's part of the tensor; made when the work starts, so that few are alive
    factors: tuple[float, ...] | None  # per stack of the layout: what a norm or a unit step is multiplied by
    multiplier: Tensor | None = None  # [units]: what a unit step is multiplied by as well
    seed: int | Tensor = 0  # of the probes, where a norm is a stochastic estimate; [units]: the first
    deviation: Deviation | None = None  # work on one replica's difference from the tensor, on its owner
    fetched: Tensor | None = None  # the whole of a sharded tensor, once it has been brought together
    dual: DualNorms | None = None  # what a unit step's work has to fill in beside

    @property
    def by_itself(self) -> bool:
        """Whether its tensor is made alone, and not along with those of other jobs."""
        return self.fetched is not None or self.deviation is not None or self.source.alone

    def tensor(self) -> Tensor:
        """This process's part of the tensor."""
        return self.source.stacked([self.job])[0]

    def whole(self) -> Tensor:
        """What the work is on, where this process holds all of it."""
        tensor = self.tensor() if self.fetched is None else self.fetched
        return tensor if self.deviation is None else self.deviation.from_mean(tensor)


@runtime_checkable
class MatrixWork(Protocol):
    """Where the work on whole matrices happens: the one object that distributed set-ups replace."""

    def norms(self, jobs: Sequence[MatrixJob]) -> list[Tensor]:
        """The dual norm of every unit, ``[units]`` in float32 or better, for each job in order."""

    def directions(self, jobs: Sequence[MatrixJob]) -> Iterator[Sequence[tuple[int, Tensor]]]:
        """Some at a time, in any order: ``(index of the job, its unit step times its factors in the parameter's shape)``.

        Of a sharded parameter, the part that this process holds. Once all have been taken, the ``dual`` of every job
        that has one is filled in.
        """

    def anywhere(self, flags: Tensor) -> Tensor:
        """``flags`` (bool, any device), true where they are true on any process that takes this step."""

    def check_same(self, tensors: Sequence[Tensor], otherwise: str) -> None:
        """Raise :class:`LayerwiseError` with the message ``otherwise`` where processes hold different values of one that
        is not sharded. Waits for the device."""
