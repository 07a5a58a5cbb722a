"""The two records of a step: a parameter at that step, and the work on the matrices of one tensor of its shape.

Both are made once a step. The optimizer makes a :class:`Job` of each parameter, and gives it to the guard, to the rate
rules and to the kinds of update. Those make a :class:`MatrixJob` where they need a norm or a unit step of each unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from layerwise.common.remember import remember
from layerwise.common.tensors import local_part
from layerwise.geometry import Geometry, Layout

State = dict[str, Any]
Group = dict[str, Any]


def local_state(param: Tensor, state: State) -> State:
    """This process's part of the state, beside its parameter: frameworks move a model after the optimizer was made."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.device != param.device:
            state[key] = value.to(param.device)
    if not hasattr(param, "to_local"):
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
    deviation: Deviation | None = None  # where the replicas' own gradients are watched

    @property
    def lr(self) -> float | Tensor:
        """The rate of this step: ``lr`` of its group, times ``lr_scale`` where it has one."""
        return rate(self.group)

    def direction_input(self) -> Tensor:
        """What a unit step goes along: the average of the gradients, or Nesterov's look-ahead."""
        average: Tensor = self.state["momentum_buffer"]
        if not self.group["nesterov"]:
            return average
        return torch.lerp(self.grad.to(average.dtype), average, self.group["momentum"])

    def norm(
        self,
        tensor: Callable[[], Tensor],
        geometry: Geometry | None = None,
        *,
        per_white_noise: bool = False,
        seed: int | Tensor = 0,
        deviation: Deviation | None = None,
    ) -> MatrixJob:
        """Ask for the dual norm of each unit of a tensor in the parameter's shape.

        Args:
            tensor: makes this process's part of it, when the work starts.
            geometry: whose norm; None: the parameter's own.
            per_white_noise: divided by the norm of white noise of unit deviation in that shape.
            seed: of the probes, where the norm is a stochastic estimate.
            deviation: take the norm of this replica's difference from ``tensor``, the mean of all.
        """
        layout, own = self.group["layout"], geometry or self.group["geometry"]
        factors = norm_factors(layout, own, tuple(self.param.shape), per_white_noise)
        return MatrixJob(self.param, layout, own, tensor, factors, seed=seed, deviation=deviation)


@remember
def norm_factors(
    layout: Layout, geometry: Geometry, shape: tuple[int, ...], per_white_noise: bool
) -> tuple[float, ...]:
    """Per stack of the layout: 1, or one over the dual norm of white noise of unit deviation in its shape."""
    return tuple(
        1.0 / geometry.white_noise_dual(d_out, d_in) if per_white_noise and k * d_out * d_in else 1.0
        for k, d_out, d_in in layout.shapes(shape)
    )


@dataclass(frozen=True, slots=True)
class DualNorms:
    """Where the dual norm of each unit goes that its unit step gives on the way: ``||u||_* = <u, lmo(u)>``."""

    values: Tensor  # [units], float32 or better: 0 until the work has filled it in, on every process
    factors: tuple[float, ...]  # per stack of the layout: what a norm is multiplied by

    def fill(self, stacks: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
        """From the matrices and their unit steps, before those are scaled."""
        products = [
            _inner_products(u, step) * factor
            for u, step, factor in zip(stacks, steps, self.factors, strict=True)
        ]
        self.values.copy_(torch.cat(products))


def _inner_products(a: Tensor, b: Tensor) -> Tensor:
    """``[k, m, n], [k, m, n] -> [k]``, each in one pass over the matrices."""
    if a.dtype == torch.float16:  # a product of entries could leave its range
        a, b = a.float(), b.float()
    return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1)).reshape(len(a))


@dataclass(frozen=True, slots=True)
class MatrixJob:
    """A dual norm, or a unit step, of each unit of one tensor in a parameter's shape."""

    param: Tensor
    layout: Layout
    geometry: Geometry
    tensor: Callable[[], Tensor]  # this process's part of it; made when the work starts: few are alive
    factors: tuple[float, ...]  # per stack of the layout: what a norm or a unit step is multiplied by
    multiplier: Tensor | None = None  # [units]: what a unit step is multiplied by as well
    seed: int | Tensor = 0  # of the probes, where a norm is a stochastic estimate
    deviation: Deviation | None = None  # work on one replica's difference from the tensor, on its owner
    fetched: Tensor | None = None  # the whole of a sharded tensor, once it has been brought together
    dual: DualNorms | None = None  # what a unit step's work has to fill in beside

    def stacks(self) -> tuple[Tensor, ...]:
        """The matrices to work on, where this process holds all of them."""
        tensor = self.tensor() if self.fetched is None else self.fetched
        if self.deviation is not None:
            tensor = self.deviation.from_mean(tensor)
        return self.layout.to_matrices(tensor)


@runtime_checkable
class MatrixWork(Protocol):
    """Where the work on whole matrices happens: the one object that distributed set-ups replace."""

    def norms(self, jobs: Sequence[MatrixJob]) -> list[Tensor]:
        """The dual norm of every unit, ``[units]`` in float32 or better, for each job in order."""

    def directions(self, jobs: Sequence[MatrixJob]) -> Iterator[tuple[int, Tensor]]:
        """``(index of the job, its unit step times its factors in the parameter's shape)``, in any order.

        Of a sharded parameter, the part that this process holds. Once all have been taken, the ``dual`` of every job
        that has one is filled in.
        """

    def anywhere(self, flags: Tensor) -> Tensor:
        """``flags`` (bool, any device), true where they are true on any process that takes this step."""

    def check_same(self, tensors: Sequence[Tensor], otherwise: str) -> None:
        """Raise :class:`LayerwiseError` with the message ``otherwise`` where processes hold different values of one that
        is not sharded. Waits for the device."""
