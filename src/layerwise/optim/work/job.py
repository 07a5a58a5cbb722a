"""What a step works on: a :class:`Job` of every parameter, and those that are alike in sets.

They are made once, and kept while nothing but numbers changes (:class:`Lineup`). State of several parameters is put together
as parts of one tensor: to put many small tensors together at every step, and the new ones back, takes longer than to compute
them. So it is done where a step is planned, and holds while the state stays where it was put.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_, itemgetter
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from layerwise.common.group_by import group_by
from layerwise.common.parameter_names import first_few
from layerwise.common.tensors import dense, is_sharded, local_part
from layerwise.errors import LayerwiseError

State = dict[str, Any]
Group = dict[str, Any]
#: Makes flags (bool, any device) true that are true on any process that takes this step.
Anywhere = Callable[[Tensor], Tensor]

#: What parameters that are worked on together have in common, beside shape, dtype and device.
_ALIKE: Final = ("update", "layout", "geometry", "norm_group", "scaling", "radius", "nesterov")
#: Many small tensors go in one launch; a chunk bounds the copies that are made of them.
CHUNK_BYTES = 64 * 2**20
#: Gradients and state of up to so many entries lie side by side: one operation for all of a shape.
_SMALL: Final = 4096
#: So many bytes of gradients at most do, as they are copies.
_COPIED_BYTES: Final = 2**23
_NO_GRADIENT = torch.empty(0)


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

    def chunks(self) -> list[list[Job]]:
        """Small ones at once, others by so many bytes of gradients."""
        return [self.jobs] if self.small else chunks(self.jobs, CHUNK_BYTES)


def chunks(jobs: Sequence[Job], limit: float) -> list[list[Job]]:
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


# ------------------------------------------------------------------------------------------------ numbers of many jobs


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """``[n, ...]``: a copy, and of one tensor a view."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def stacked_by(operation: str, some: Sequence[Tensor], others: Sequence[Tensor], *rest: float) -> Tensor:
    """``[n, ...]``: ``operation(a, b, *rest)`` of each pair; a processor writes each once, others launch twice for all."""
    if not some[0].is_cpu or torch.compiler.is_compiling():
        found = torch.stack(list(some))
        getattr(torch, f"_foreach_{operation}_")(found.unbind(), others, *rest)
        return found
    found = some[0].new_empty(len(some), *some[0].shape)
    for part, a, b in zip(found.unbind(), some, others, strict=True):
        getattr(torch, operation)(a, b, *rest, out=part)
    return found


def stack_of(jobs: Sequence[Job], key: str | None = None) -> Tensor:
    """``[jobs, *shape]`` of jobs that are alike, not to be written to: the state under a key; None: the gradients.

    A view where they lie side by side and these are neighbours there; jobs keep their order everywhere.
    """
    some, first, count = jobs[0].alike, jobs[0].row, len(jobs)
    whole = None if some is None else some.grads if key is None else some.state.get(key)
    if whole is None or jobs[-1].row - first != count - 1:
        return stacked([job.grad if key is None else job.state[key] for job in jobs])
    return whole if count == len(whole) else whole[first : first + count]


def state_and_gradients(jobs: Sequence[Job], key: str) -> tuple[list[Tensor], list[Tensor]]:
    """The state under a key of jobs that are alike, and their gradients in its dtype. Of a whole set it may be written to.

    Of each job; of those whose state lies side by side all in one tensor.
    """
    some = jobs[0].alike
    if some is not None and key in some.state:
        own, grads = [stack_of(jobs, key)], [stack_of(jobs)]
    else:
        own, grads = [job.state[key] for job in jobs], [job.grad for job in jobs]
    pairs = zip(own, grads, strict=True)  # asking torch for no change takes ten times as long as to see that there is none
    return own, [grad if grad.dtype == value.dtype else grad.to(value.dtype) for value, grad in pairs]


def select(keep: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """``new`` where ``keep`` allows it, else ``old``: a choice and no product, so that NaN cannot pass."""
    return new if keep is None else torch.where(keep.to(new.device), new, old)


def select_all(keep: Tensor, new: list[Tensor], old: Sequence[Tensor | float]) -> list[Tensor]:
    """:func:`select` for many tensors, in the dtype of ``old``: one choice for all of a shape, so few launches."""
    chosen = list(new)
    for alike in _by_shape(new):
        before = [old[i] for i in alike]
        values, tensors = stacked([new[i] for i in alike]), [b for b in before if isinstance(b, Tensor)]
        if tensors:
            values = values.to(tensors[0].dtype)
        together = select(keep, values, stacked(tensors) if tensors else before[0])
        for i, tensor in zip(alike, together.unbind(), strict=True):
            chosen[i] = tensor
    return chosen


def scaled_all(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """Each times a number of its own on its device: one product for all of a shape, so few launches."""
    scaled = list(tensors)
    for alike in _by_shape(tensors):
        together, own = stacked([tensors[i] for i in alike]), torch.stack([factors[i] for i in alike])
        products = together * own.view(-1, *[1] * (together.ndim - 1))
        for i, product in zip(alike, products.unbind(), strict=True):
            scaled[i] = product
    return scaled


def _by_shape(tensors: Sequence[Tensor]) -> Iterable[list[int]]:
    """Which are of one shape, dtype and device."""
    return group_by(range(len(tensors)), lambda i: (tensors[i].shape, tensors[i].dtype, tensors[i].device)).values()


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


def _momentum_key(group: Group) -> float | tuple[int]:
    """Equal for groups whose ``current_momentum`` is; a momentum that warms up would compile every step anew."""
    compiled = torch.compiler.is_compiling() and "momentum_steps" in group
    return (id(group),) if compiled else current_momentum(group)


def rate(group: Group) -> float | Tensor:
    """The learning rate of a group's steps: its ``lr``, times its ``lr_scale`` where it has one."""
    lr: Any = group["lr"]
    scale = group.get("lr_scale", 1.0)
    if not isinstance(lr, Tensor) and (isinstance(lr, str) or not 0.0 <= lr < math.inf):
        raise LayerwiseError(
            f"lr is {lr!r} in the group of {first_few(group['param_names'])}: give a finite number of at least 0 (has a "
            "schedule run past its end?)"
        )
    taken: float | Tensor = lr if scale == 1.0 else lr * scale
    return taken


# ------------------------------------------------------------------------------------------------------ all of a step


class Lineup:
    """A :class:`Job` of every parameter, and those that are alike in sets. Gradients are here during a step alone."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.moving: list[Job] = []  # those of which any process has a gradient
        self.gradients: list[Tensor] = []  # theirs, in as few tensors as they lie in
        self.steps: list[Any] = []  # of all jobs, by the kind of update: what its `plan` made
        self.half = False  # whether any are in half precision, or rounded at random
        self._sharded: list[Job] = []
        self._alike: list[Alike] = []  # those that move in sets
        self._groups: list[Group] = []
        self._states: list[State] = []
        self._form: object = None  # what jobs and sets depend on, beside which tensors there are
        self._moves: list[bool] | None = None

    def fits(self, groups: Sequence[Group], states: Mapping[Tensor, State]) -> bool:
        """Whether the optimizer's groups, tensors, states and options are those that they were when it was last asked.

        Where they are not, `refresh` will take new jobs. Of a momentum, which schedules move, only which groups have the
        same is an option that counts.
        """
        params = [param for group in groups for param in group["params"]]
        own = [job.param for job in self.jobs]
        kept = ((groups, self._groups), (params, own), (states.values(), self._states))
        same = all(len(now) == len(then) and all(map(is_, now, then)) for now, then in kept)
        joined = all(joined.holds() for step in self.steps for joined in getattr(step, "joined", ()))
        options = [[*(group[key] for key in _ALIKE), group["rates"], list(group["param_names"])] for group in groups]
        first: dict[float, int] = {}
        momenta = [first.setdefault(current_momentum(group), number) for number, group in enumerate(groups)]
        before = self._form
        self._form = options, momenta, [(param.shape, param.dtype, param.device) for param in params]
        if not (same and joined and self._form == before):
            self._moves = None
        return self._moves is not None

    def refresh(
        self, groups: list[Group], states: Mapping[Tensor, State], anywhere: Callable[[Tensor], Tensor] | None
    ) -> bool:
        """Take this step's gradients and rates; whether that took new jobs.

        Where another process has a gradient and this one has none, it stands for zero. ``anywhere`` as of `MatrixWork`.
        """
        moves = [param.grad is not None for group in groups for param in group["params"]]
        if anywhere is not None:
            moves = anywhere(torch.tensor(moves, device="cpu")).tolist()
        new = moves != self._moves
        if new:
            self._make(groups, states, moves)
        for job in self._sharded:  # what this process holds of one is another tensor at every step
            job.local, job.state = local_part(job.param), local_state(job.param, states[job.param])
        self.gradients = []
        rates = {id(group): rate(group) for group in groups}
        for job in self.moving:
            grad = job.param.grad
            if grad is None:
                grad = torch.zeros_like(job.local)
            elif grad.layout is not torch.strided or job.local is not job.param:
                grad = local_part(dense(job.name, grad))
            job.grad, job.lr = grad, rates[id(job.group)]
        for some in self._alike:
            grads = [job.grad for job in some.jobs]
            if some.small:
                some.grads = torch.stack(grads)
            self.gradients += grads if some.grads is None else [some.grads]
        return new

    def _make(self, groups: list[Group], states: Mapping[Tensor, State], moves: list[bool]) -> None:
        any_moves = iter(moves)
        self.jobs = [
            _job(name, param, next(any_moves), group, states[param])
            for group in groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        ]
        self.moving = [job for job in self.jobs if job.moves]
        self._sharded = [job for job in self.jobs if job.local is not job.param]
        self._alike = alike(self.moving)
        by_update = group_by(self.jobs, lambda job: job.group["update"])
        self.steps = [step for update, jobs in by_update.items() for step in update.plan(jobs)]
        self.half = any(job.local.dtype.itemsize < 4 or "rounding_seed" in job.group for job in self.jobs)
        self._groups, self._states, self._moves = list(groups), list(states.values()), moves

    def release(self) -> None:
        """Keep no gradient alive when the step is over."""
        for job in self.moving:
            job.grad, job.deviation = _NO_GRADIENT, None
        for some in self._alike:
            some.grads = None
        self.gradients = []


def _job(name: str, param: Tensor, moves: bool, group: Group, state: State) -> Job:
    local = local_part(param)
    moves = moves and param.numel() > 0
    if moves and param.device.type == "meta":
        raise LayerwiseError(
            f"parameter {name!r} is on the meta device and has no numbers, and neither has its gradient: materialise the "
            "model (model.to_empty(device=...), then its weights) before the first step"
        )
    return Job(name, param, local, _NO_GRADIENT, moves, group, local_state(param, state), group["lr"])


def alike(jobs: Iterable[Job]) -> list[Alike]:
    """Those whose matrices are worked on together."""
    # By identity first: to hash a layout and a geometry for each would take longer than its work.
    by_group = group_by(jobs, lambda job: (id(job.group), job.param.shape, job.param.dtype, job.param.device))
    together: dict[object, Alike] = {}
    for (_, *form), members in by_group.items():
        group = members[0].group
        key = (*(group[key] for key in _ALIKE), _momentum_key(group), id(group["rates"]), *form)
        together.setdefault(key, Alike([])).jobs.extend(members)
    left = _COPIED_BYTES
    for some in together.values():
        first = some.jobs[0]
        left -= len(some.jobs) * first.local.nbytes
        small = first.local is first.param and first.param.numel() <= _SMALL
        some.small = small and len(some.jobs) > 1 and left >= 0
        for row, job in enumerate(some.jobs):
            job.alike, job.row = some, row
    return list(together.values())


class JoinedState(NamedTuple):
    """A flat tensor whose parts, in order, are the state of some parameters under a key."""

    whole: Tensor
    parts: list[Tensor]
    states: list[State]
    key: str

    def holds(self) -> bool:
        """Whether they still are: users put other tensors there, and some programs other memory under a tensor."""
        in_place = all(map(is_, self.parts, map(itemgetter(self.key), self.states)))
        memory = {tensor.untyped_storage()._cdata for tensor in (self.parts[0], self.whole, self.parts[-1])}
        return in_place and len(memory) == 1


def join_state(jobs: Sequence[Job], key: str) -> JoinedState | None:
    """Make the state under a key of some parameters, in their order, parts of one new tensor.

    None where it is left as it is: in a compiled step, of sharded parameters, on several devices or in several dtypes, and
    where it lies side by side with state of others, which would keep all of that memory alive.
    """
    own = [job.state[key] for job in jobs]
    alike = len({(tensor.dtype, tensor.device) for tensor in own}) == 1
    if torch.compiler.is_compiling() or not alike or any(job.local is not job.param for job in jobs):
        return None
    before = [tensor for tensor in own if tensor._base is not None]
    bases = {id(tensor._base): tensor._base for tensor in before}
    if sum(base.numel() for base in bases.values()) != sum(tensor.numel() for tensor in before):
        return None
    whole = torch.cat([tensor.flatten() for tensor in own])
    parts = [part.view(old.shape) for part, old in zip(whole.split([t.numel() for t in own]), own, strict=True)]
    states = [job.state for job in jobs]
    for state, part in zip(states, parts, strict=True):
        state[key] = part
    return JoinedState(whole, parts, states, key)
