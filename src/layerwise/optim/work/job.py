"""The two records of a step: a parameter at that step, and the work on the matrices of all parameters that are alike.

The optimizer makes a :class:`Job` of each parameter once a step, and gives it to the guard, to the rate rules and to the
kinds of update. Those make a :class:`MatrixJob` of all that are alike where they need a norm or a unit step of each unit.
What the matrices come from, a :class:`Source` makes for all of them together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from layerwise.common.checked import checked
from layerwise.common.remember import remember
from layerwise.common.tensors import in_dtypes_of, is_sharded, local_part
from layerwise.errors import LayerwiseError
from layerwise.geometry import Geometry, Layout

State = dict[str, Any]
Group = dict[str, Any]

#: Many small tensors go in one launch; a chunk bounds the copies that are made of them.
CHUNK_BYTES = 64 * 2**20


def local_state(param: Tensor, state: State) -> State:
    """This process's part of the state."""
    if not is_sharded(param):
        return state
    return {key: local_part(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def current_momentum(group: Group) -> float:
    """Weight of the old average in this step: the group's ``momentum``, and less while it warms up.

    Over ``momentum_warmup`` steps the average's window, ``1 / (1 - momentum)`` gradients, grows evenly from one gradient to
    its full length: early on the average forgets the weights that the network started with.
    """
    full: float = group["momentum"]
    warmup = group.get("momentum_warmup", 0)
    taken = group["momentum_steps"] + 1 if warmup else 0
    return full if taken >= warmup else 1.0 - 1.0 / (1.0 + taken / warmup * full / (1.0 - full))


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
    grad: Tensor  # of this step, then empty; zeros where another process alone has one
    moves: bool  # whether any process has a gradient; else the parameter is left alone
    group: Group
    state: State
    lr: float | Tensor  # of this step: that of its group, times the group's lr_scale
    deviation: Deviation | None = None  # where the replicas' own gradients are watched
    dual: Tensor | None = None  # [units], where its unit step writes its direction's dual norm, once wanted
    fetched: Tensor | None = None  # the whole of a sharded tensor that a step works on, once brought together
    alike: Alike | None = None  # the set that it is in, and which of it
    row: int = 0


@dataclass(eq=False, slots=True)
class Alike:
    """Parameters whose matrices are worked on together: one record, and few operations, for all of them."""

    jobs: list[Job]
    small: bool = False  # so small that their gradients and state lie side by side
    grads: Tensor | None = None  # [jobs, *shape], the gradients of the step where they do
    state: dict[str, Tensor] = field(default_factory=dict)  # [jobs, *shape], where state under a key does
    norms: Tensor | None = None  # [norms, jobs, units], those that the rate rule asked for

    def rows(self, jobs: Sequence[Job], whole: Tensor | None) -> Tensor | None:
        """What is of some of them in a tensor of all, if they are neighbours there; jobs keep their order everywhere."""
        first, count = jobs[0].row, len(jobs)
        if whole is None or jobs[-1].row - first != count - 1:
            return None
        return whole if count == len(self.jobs) else whole[first : first + count]

    def chunks(self) -> list[list[Job]]:
        """Small ones at once, others by so many bytes of gradients."""
        return [self.jobs] if self.small else chunks(self.jobs, CHUNK_BYTES)


def chunks(jobs: Sequence[Job], limit: int) -> list[list[Job]]:
    """In order, each of gradients of at most ``limit`` bytes; a larger one comes alone."""
    found: list[list[Job]] = []
    held = 0
    for job in jobs:
        size = job.local.nbytes
        if not found or held + size > limit:
            found.append([])
            held = 0
        found[-1].append(job)
        held += size
    return found


def gradients(jobs: Sequence[Job]) -> Tensor:
    """``[jobs, *shape]`` of jobs that are alike, not to be written to."""
    some = jobs[0].alike
    whole = None if some is None else some.rows(jobs, some.grads)
    return stacked([job.grad for job in jobs]) if whole is None else whole


def state_of(jobs: Sequence[Job], key: str) -> Tensor:
    """``[jobs, *shape]`` of jobs that are alike, not to be written to: the state under a key."""
    some = jobs[0].alike
    whole = None if some is None else some.rows(jobs, some.state.get(key))
    return stacked([job.state[key] for job in jobs]) if whole is None else whole


def state_and_gradients(jobs: Sequence[Job], key: str) -> tuple[list[Tensor], list[Tensor]]:
    """The state under a key of jobs that are alike, to be written to, and their gradients in its dtype.

    Of each job; of those whose state lies side by side all in one tensor.
    """
    some = jobs[0].alike
    whole = None if some is None else some.rows(jobs, some.state.get(key))
    own = [job.state[key] for job in jobs] if whole is None else [whole]
    return own, in_dtypes_of(own, [job.grad for job in jobs] if whole is None else [gradients(jobs)])


class Source(ABC):
    """What the matrices of jobs are made of."""

    #: whether the work is on one replica's difference from what `stacked` gives, see :class:`Deviation`
    of_replica: ClassVar[bool] = False

    @abstractmethod
    def stacked(self, jobs: Sequence[Job]) -> Tensor:
        """``[jobs, *shape]``: this process's part of one tensor for each, all of one shape and with one momentum."""


@dataclass(frozen=True)
class _Made(Source):
    """One by one, by a function."""

    make: Callable[[Job], Tensor]

    def stacked(self, jobs: Sequence[Job]) -> Tensor:
        return stacked([self.make(job) for job in jobs])


@dataclass(frozen=True)
class Gradients(Source):
    """The gradients of the step."""

    def stacked(self, jobs: Sequence[Job]) -> Tensor:
        return gradients(jobs)


@dataclass(frozen=True)
class Directions(Source):
    """What unit steps go along: the average of the gradients, or Nesterov's look-ahead."""

    def stacked(self, jobs: Sequence[Job]) -> Tensor:
        group = jobs[0].group
        if not group["nesterov"]:
            return state_of(jobs, "momentum_buffer")
        averages, grads = state_and_gradients(jobs, "momentum_buffer")
        if len(grads) == 1:
            return torch.lerp(grads[0], averages[0], current_momentum(group)).view(len(jobs), *jobs[0].grad.shape)
        ahead = torch.stack(grads)
        torch._foreach_lerp_(ahead.unbind(), averages, current_momentum(group))
        return ahead


GRADIENTS, DIRECTIONS = Gradients(), Directions()


@remember
def white_noise_factors(layout: Layout, geometry: Geometry, shape: tuple[int, ...]) -> tuple[float, ...]:
    """Per stack of the layout: one over the dual norm of white noise of unit deviation in its shape; 1 for an empty one."""
    return tuple(
        1.0 / geometry.white_noise_dual(d_out, d_in) if k * d_out * d_in else 1.0 for k, d_out, d_in in layout.shapes(shape)
    )


@checked
@dataclass(frozen=True)
class DualNorm:
    """A norm that a rate rule asks for: the dual norm of each unit of a tensor in the parameter's shape.

    Args:
        of: makes this process's part of the tensor from a parameter's :class:`Job`, when the work starts. A
            :class:`Source` makes those of many parameters in a few launches.
        geometry: whose norm; None: the parameter's own.
        per_white_noise: divided by the norm of white noise of unit deviation in that shape.
        seed: the rule's number of each unit that picks the probes where the norm is a stochastic estimate; None: the same
            probes at every step. A parameter's units take that of its first.

    Examples:
        >>> lw.DualNorm(lambda job: job.grad, lw.Frobenius()).geometry
        Frobenius()
    """

    of: Callable[[Job], Tensor] | Source
    geometry: Geometry | None = None
    per_white_noise: bool = False
    seed: str | None = None

    def asked_of(self, jobs: Sequence[Job]) -> MatrixJob:
        """The work of it on parameters that are alike."""
        group, param = jobs[0].group, jobs[0].param
        geometry, factors = self.geometry or group["geometry"], None
        if self.per_white_noise:
            factors = white_noise_factors(group["layout"], geometry, tuple(param.shape))
        source = self.of if isinstance(self.of, Source) else _Made(self.of)
        return MatrixJob(jobs, source, geometry, factors, self.seed)


@dataclass(frozen=True, slots=True)
class MatrixJob:
    """A dual norm, or a unit step, of each unit of one tensor in the shape of each of some parameters that are alike.

    Processes that share the work divide it by parameter.
    """

    jobs: Sequence[Job]
    source: Source  # of the tensors, made when the work starts, so that few are alive
    geometry: Geometry
    factors: tuple[float, ...] | None  # per stack of the layout: what a norm or a unit step is multiplied by
    seed: str | None = None  # of a norm's probes: a number in the parameters' state

    @property
    def param(self) -> Tensor:
        """The first of the parameters, or this process's part of it where that is all it works on."""
        return self.jobs[0].param

    @property
    def layout(self) -> Layout:
        layout: Layout = self.jobs[0].group["layout"]
        return layout

    @property
    def deviation(self) -> Deviation | None:
        """Where the work is on what one replica differs by: that of the first parameter."""
        return _deviation(self.jobs[0]) if self.source.of_replica else None

    def tensor(self) -> Tensor:
        """This process's part of the tensor, where the work is on one parameter."""
        return self.source.stacked(self.jobs)[0]

    def tensors(self) -> Tensor:
        """``[jobs, *shape]``: what the work is on, where this process holds all of it."""
        given = [job.fetched for job in self.jobs if job.fetched is not None]
        found = stacked(given) if given else self.source.stacked(self.jobs)
        if not self.source.of_replica:
            return found
        return stacked([_deviation(job).from_mean(mean) for job, mean in zip(self.jobs, found, strict=True)])

    def of_fetched(self, whole: Tensor) -> MatrixJob:
        """The work on the whole of its one parameter's tensor."""
        return replace(self, jobs=[replace(self.jobs[0], fetched=whole)])

    def each(self) -> list[MatrixJob]:
        """The work parameter by parameter."""
        return [replace(self, jobs=[job]) for job in self.jobs]

    def pieces(self, at_once: int) -> list[MatrixJob]:
        """In order, each of at most so many parameters."""
        if len(self.jobs) <= at_once:
            return [self]
        starts = range(0, len(self.jobs), at_once)
        return [replace(self, jobs=self.jobs[start : start + at_once]) for start in starts]


def _deviation(job: Job) -> Deviation:
    if job.deviation is None:
        raise LayerwiseError(
            "noise reference 'replicas' compares the gradients of data-parallel processes: call "
            "optimizer.watch_replicas(model) with the DistributedDataParallel or fully_shard model before the first "
            "backward(), or, on one process, use reference='independent' (two halves of an accumulated batch) or 'previous'"
        )
    return job.deviation


@runtime_checkable
class MatrixWork(Protocol):
    """Where the work on whole matrices happens: the one object that distributed set-ups replace."""

    def norms(self, asked: Sequence[MatrixJob]) -> list[Tensor]:
        """The dual norm of every unit, ``[jobs, units]`` in float32 or better, for each that is asked, in order.

        Each is of as many parameters as are worked on together (``norms_at_once``).
        """

    def directions(self, asked: Sequence[MatrixJob]) -> Iterator[tuple[Sequence[Job], Sequence[Tensor]]]:
        """Some parameters at a time, in any order, with their unit steps times factors and multipliers, in their shapes.

        Each that is asked is of as many parameters as are worked on together (``directions_at_once``). Of a sharded
        parameter, the part that this process holds. Once all have been taken, the ``dual`` of every job that has one is
        filled in.
        """

    def anywhere(self, flags: Tensor) -> Tensor:
        """``flags`` (bool, any device), true where they are true on any process that takes this step."""

    def check_same(self, tensors: Sequence[Tensor], otherwise: str) -> None:
        """Raise :class:`LayerwiseError` with the message ``otherwise`` where processes hold different values of one that
        is not sharded. Waits for the device."""
