"""All parameters of an optimizer as its steps see them: made once, and kept while nothing but numbers changes.

State of several parameters is put together as parts of one tensor: to put many small tensors together at every step, and
the new ones back, takes longer than to compute them. So it is done where a step is planned, and holds while the state stays
where it was put.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from layerwise.common.tensors import dense, local_part
from layerwise.errors import LayerwiseError
from layerwise.optim.work.job import Alike, Group, Job, MatrixWork, State, current_momentum, local_state, rate

#: What parameters that are worked on together have in common, beside shape, dtype and device.
_ALIKE: Final = ("update", "layout", "geometry", "scaling", "radius", "nesterov")
#: Gradients and state of up to so many entries lie side by side: one operation for all of a shape.
_SMALL: Final = 4096
#: So many bytes of gradients at most do, as they are copies.
_COPIED_BYTES: Final = 2**23
_NO_GRADIENT = torch.empty(0)


class Lineup:
    """A :class:`Job` of every parameter, and those that are alike in sets. Gradients are here during a step alone."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.moving: list[Job] = []  # those of which any process has a gradient
        self.gradients: list[Tensor] = []  # theirs, in as few tensors as they lie in
        self.steps: list[Any] = []  # of all jobs, by the kind of update: a `PlannedStep` each
        self.half = False  # whether any are in half precision, or rounded at random
        self._sharded: list[Job] = []
        self._alike: list[Alike] = []  # those that move in sets
        self._groups: list[Group] = []
        self._states: list[State] = []
        self._form: object = None
        self._moves: list[bool] | None = None

    def fits(self, groups: Sequence[Group], states: Mapping[Tensor, State]) -> bool:
        """Whether the optimizer's groups, tensors, states and options are still those that this was made of."""
        params = [param for group in groups for param in group["params"]]
        own = [job.param for job in self.jobs]
        kept = ((groups, self._groups), (params, own), (states.values(), self._states))
        same = all(len(now) == len(then) and all(map(is_, now, then)) for now, then in kept)
        joined = all(joined.holds() for step in self.steps for joined in step.joined)
        return same and joined and _form(groups, params) == self._form

    def forget(self) -> None:
        """What this was made of has changed."""
        self._moves = None

    def refresh(self, groups: list[Group], states: Mapping[Tensor, State], work: MatrixWork) -> bool:
        """Take this step's gradients and rates; whether that took new jobs.

        Where another process has a gradient and this one has none, it stands for zero.
        """
        here = [param.grad is not None for group in groups for param in group["params"]]
        flags = torch.tensor(here)
        anywhere = work.anywhere(flags)
        moves = here if anywhere is flags else anywhere.tolist()
        new = moves != self._moves
        if new:
            self._make(groups, states, moves)
        for job in self._sharded:  # what this process holds of one is another tensor at every step
            job.local, job.state = local_part(job.param), local_state(job.param, states[job.param])
        self.gradients = []
        rates = {id(group): rate(group) for group in groups}
        for job in self.moving:
            grad = job.param.grad
            if grad is None or grad.layout is not torch.strided or job.local is not job.param:
                grad = _gradient(job)
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
        by_update: dict[Any, list[Job]] = {}
        for job in self.jobs:
            by_update.setdefault(job.group["update"], []).append(job)
        self.steps = [update.plan(jobs) for update, jobs in by_update.items()]
        self.half = any(job.local.dtype.itemsize < 4 or "rounding_seed" in job.group for job in self.jobs)
        self._groups, self._states, self._moves = list(groups), list(states.values()), moves
        self._form = _form(groups, [job.param for job in self.jobs])

    def release(self) -> None:
        """Keep no gradient alive when the step is over."""
        for job in self.moving:
            job.grad, job.deviation = _NO_GRADIENT, None
        for some in self._alike:
            some.grads = None
        self.gradients = []


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


def _form(groups: Sequence[Group], params: Sequence[Tensor]) -> object:
    """What jobs and sets depend on, beside which tensors there are."""
    options = [[*(group[key] for key in _ALIKE), group["rates"], list(group["param_names"])] for group in groups]
    # Of a momentum, which schedules move, only which groups have the same.
    first: dict[float, int] = {}
    momenta = [first.setdefault(current_momentum(group), number) for number, group in enumerate(groups)]
    return options, momenta, [(param.shape, param.dtype, param.device) for param in params]


def _job(name: str, param: Tensor, moves: bool, group: Group, state: State) -> Job:
    local = local_part(param)
    moves = moves and param.numel() > 0
    if moves and param.device.type == "meta":
        raise LayerwiseError(
            f"parameter {name!r} is on the meta device and has no numbers, and neither has its gradient: materialise the "
            "model (model.to_empty(device=...), then its weights) before the first step"
        )
    return Job(name, param, local, _NO_GRADIENT, moves, group, local_state(param, state), group["lr"])


def _gradient(job: Job) -> Tensor:
    """This process's part of a gradient that may be none or sharded. Raises LayerwiseError for a sparse one."""
    grad = job.param.grad
    return torch.zeros_like(job.local) if grad is None else local_part(dense(job.name, grad))


def alike(jobs: Iterable[Job]) -> list[Alike]:
    """Those whose matrices are worked on together."""
    by_group: dict[tuple[int, torch.Size, torch.dtype, torch.device], list[Job]] = {}
    # By identity first: to hash a layout and a geometry for each would take longer than its work.
    for job in jobs:
        param = job.param
        by_group.setdefault((id(job.group), param.shape, param.dtype, param.device), []).append(job)
    together: dict[object, Alike] = {}
    for (_, *form), members in by_group.items():
        group = members[0].group
        key = (*(group[key] for key in _ALIKE), current_momentum(group), id(group["rates"]), *form)
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
