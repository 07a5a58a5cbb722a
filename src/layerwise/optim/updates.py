"""Kinds of update: what a parameter's state is, and what one step does to it.

A parameter group names its kind with ``update``: ``"lmo"``, ``"adamw"``, or an object of a class of one's own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import is_
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from layerwise.common.group_by import group_by
from layerwise.common.tensors import widened
from layerwise.errors import LayerwiseError
from layerwise.optim.rounding import HALF, is_stochastic, move_once_rounded, store
from layerwise.optim.rules.rule import NormGroup, RateRule
from layerwise.optim.scaling import step_factors
from layerwise.optim.work.job import (
    CHUNK_BYTES,
    Alike,
    Group,
    Job,
    JoinedState,
    State,
    chunks,
    current_momentum,
    join_state,
    scaled_all,
    select_all,
    state_and_gradients,
)
from layerwise.optim.work.local import DIRECTIONS, MatrixJob, MatrixWork, directions_at_once

#: A step of some parameters, prepared: gradients and rates are read when it is called with the work and ``keep``.
Planned = Callable[[MatrixWork, Tensor | None], None]
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
#: On a CPU AdamW goes over a chunk several times: it should stay in the cache, and its copies small beside a model.
ADAMW_BYTES = 2**20


class Update(ABC):
    """A kind of update. Make it a frozen dataclass: a checkpoint holds its ``repr`` and loads where that is the same.

    ``job.lr`` is the rate of the step, with the group's ``lr_scale`` in it.

    ``keep``, where it is not None, is a 0-dimensional bool tensor on a device: where it is false nothing may change, and
    gradients may hold anything, NaN included. So it selects values and never multiplies them (0 * nan is nan).

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class SGD(lw.Update):
        ...     def allocate(self, group, name, param):
        ...         return {}
        ...
        ...     def step(self, jobs, work, keep):
        ...         for job in jobs:
        ...             if job.moves:
        ...                 grad = job.grad if keep is None else torch.where(keep, job.grad, 0)
        ...                 job.local.sub_(grad, alpha=job.lr)
        >>> model = nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> optimizer = lw.LayerwiseOptimizer(lw.param_groups(model), {"default": {"update": SGD()}}, lr=0.1)
        >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()
        >>> optimizer.step()
        >>> (model.weight - before).detach()
        tensor([[-0.1000, -0.2000]])
    """

    #: group options that this kind does not read: giving one warns, and the optimizer's repr leaves them out
    unused: ClassVar[tuple[str, ...]] = ("momentum", "nesterov", "scaling", "radius", "rates")
    #: group options without which its state means something else: a checkpoint loads where they are the same
    fixed: ClassVar[tuple[str, ...]] = ()
    #: group options that do not begin in mid-run: a group loses them with a checkpoint that has no word of them
    from_start: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def allocate(self, group: Group, name: str, param: Tensor) -> State:
        """State for one parameter; tensors in it keep their keys, shapes and dtypes."""

    @abstractmethod
    def step(self, jobs: Sequence[Job], work: MatrixWork, keep: Tensor | None) -> None:
        """Change all parameters of this kind, in place, that have a gradient (``job.moves``)."""

    def plan(self, jobs: Sequence[Job]) -> Sequence[Planned]:
        """Prepare the steps of these parameters; asked again when they or their options change. Few kinds need it."""
        return [partial(self.step, jobs)]

    def rule(self, group: Group) -> RateRule | None:
        """What sets the rates of a group's units, if anything does."""
        return None

    def unit_names(self, group: Group, name: str, param: Tensor) -> tuple[str, ...]:
        """Names of a parameter's units: here it is one as a whole."""
        return (name,)


@dataclass(frozen=True, repr=False)
class AdamW(Update):
    """torch's AdamW, called as a function on our state; quasi-hyperbolic where the group has a ``nu`` below 1.

    Of a float16 parameter in float32 throughout: ``eps`` and small second moments are 0 in float16, and the step NaN.
    """

    unused = ("geometry", *Update.unused)
    from_start = ("nu",)

    def __repr__(self) -> str:
        return "adamw"

    def allocate(self, group: Group, name: str, param: Tensor) -> State:
        """The state torch.optim.AdamW would make at its first step."""
        dtype = torch.float32 if param.dtype == torch.float16 else param.dtype
        return {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
        }

    def step(self, jobs: Sequence[Job], work: MatrixWork, keep: Tensor | None) -> None:
        for planned in self.plan(jobs):
            planned(work, keep)

    def plan(self, jobs: Sequence[Job]) -> Sequence[Planned]:
        moving = [job for job in jobs if job.moves]
        together = group_by(moving, lambda job: (id(job.group), job.local.dtype, job.local.device))
        steps: list[Planned] = []
        for (_, _, device), some in together.items():
            mixed = some[0].group.get("nu", 1.0) < 1.0
            step, limit = (_quasi_hyperbolic_step, CHUNK_BYTES) if mixed else (_adamw_step, math.inf)
            steps += [partial(step, chunk) for chunk in chunks(some, ADAMW_BYTES if device.type == "cpu" else limit)]
        return steps


def _adamw_step(jobs: Sequence[Job], work: MatrixWork, keep: Tensor | None) -> None:
    """Of parameters of one group and one dtype. In float32 where the weights are not enough, and then rounded once."""
    group, lr, first = jobs[0].group, jobs[0].lr, jobs[0].local
    wide = first.dtype in HALF and (first.dtype == torch.float16 or is_stochastic(group, first))
    params = [job.local.float() if wide else job.local for job in jobs]
    grads, averages, squares = _in_dtype(jobs, params[0].dtype)
    # The fused kernel can be told on the device to do nothing, which is what `keep` needs, and rounds bfloat16 once.
    fused = keep is not None or isinstance(lr, Tensor) or first.dtype == torch.bfloat16
    adamw(
        params,
        grads,
        averages,
        squares,
        [],
        [job.state["step"] for job in jobs],
        foreach=not (fused or torch.compiler.is_compiling()) and len(jobs) > 1,  # torch's cannot be compiled on a CPU
        fused=fused,
        found_inf=None if keep is None else 1.0 - keep.float(),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    if any(average is not job.state["exp_avg"] for job, average in zip(jobs, averages, strict=True)):
        _keep_moments(jobs, averages, squares)
    for job, param in zip(jobs, params, strict=True) if wide else ():
        store(job, param)


def _quasi_hyperbolic_step(jobs: Sequence[Job], work: MatrixWork, keep: Tensor | None) -> None:
    """QHAdam's step (Ma and Yarats, arXiv 1810.06801) with decoupled decay, of parameters of one group and one dtype.

    ``U = nu M / (1 - b1^t) + (1 - nu) G``, and a step ``-lr U / (sqrt(V / (1 - b2^t)) + eps)``, where t are a parameter's
    steps.
    """
    group = jobs[0].group
    dtype = torch.promote_types(jobs[0].state["exp_avg"].dtype, torch.float32)
    grads, averages, squares = _in_dtype(jobs, dtype)
    squared = list(torch._foreach_mul(grads, grads))
    if keep is not None:  # a lerp from a number to itself changes nothing
        grads, squared = select_all(keep, grads, averages), select_all(keep, squared, squares)
    (beta1, beta2), nu, steps = group["betas"], group["nu"], [job.state["step"] for job in jobs]
    torch._foreach_lerp_(averages, grads, 1.0 - beta1)
    torch._foreach_lerp_(squares, squared, 1.0 - beta2)
    torch._foreach_add_(steps, 1.0 if keep is None else [keep.to(steps[0])] * len(steps))
    at_hand = keep is None and steps[0].is_cpu and not torch.compiler.is_compiling()
    taken = [float(step) for step in steps] if at_hand else torch.stack(steps)
    direction = _corrected(averages, nu, beta1, taken)
    torch._foreach_add_(direction, grads, alpha=1.0 - nu)
    sizes = _corrected(squares, 1.0, beta2, taken)
    torch._foreach_sqrt_(sizes)
    torch._foreach_add_(sizes, group["eps"])
    torch._foreach_div_(direction, sizes)
    move(jobs, direction, keep)
    _keep_moments(jobs, averages, squares)


def _corrected(averages: list[Tensor], weight: float, beta: float, taken: list[float] | Tensor) -> list[Tensor]:
    """Each times ``weight / (1 - beta^t)`` at its own step t; those are on the device where reading them would wait."""
    if isinstance(taken, Tensor):
        return scaled_all(averages, (weight / (1.0 - beta**taken)).unbind())
    factors = [weight / (1.0 - beta**t) for t in taken]
    return list(torch._foreach_mul(averages, factors[0] if len(set(taken)) == 1 else factors))


def _in_dtype(jobs: Sequence[Job], dtype: torch.dtype) -> list[list[Tensor]]:
    """The gradients, and AdamW's averages of them and of their squares, in the dtype that a step works in."""
    held = [[job.grad for job in jobs], *([job.state[key] for job in jobs] for key in _MOMENTS)]
    return [[value if value.dtype == dtype else value.to(dtype) for value in some] for some in held]


def _keep_moments(jobs: Sequence[Job], *moments: list[Tensor]) -> None:
    """Into the state, in its own dtype."""
    for key, values in zip(_MOMENTS, moments, strict=True):
        held = [job.state[key] for job in jobs]
        if not all(map(is_, held, values)):
            torch._foreach_copy_(held, values)


@dataclass(frozen=True, repr=False)
class Lmo(Update):
    """A unit step of the momentum in each unit's own norm, at each unit's own rate.

    LMO: the linear minimisation oracle of the norm's unit ball, as Scion (arXiv 2502.07529) calls the unit step.
    """

    unused = ("betas", "eps", "nu")
    fixed = ("nesterov", "scaling", "radius")
    from_start = ("momentum_warmup", "momentum_steps")

    def __repr__(self) -> str:
        return "lmo"

    def allocate(self, group: Group, name: str, param: Tensor) -> State:
        try:
            step_factors(  # fails here, not in the first step
                group["layout"], group["geometry"], group["scaling"], group["radius"], tuple(param.shape)
            )
        except LayerwiseError as error:
            raise LayerwiseError(f"parameter {name!r}: {error}") from None
        state: State = {"momentum_buffer": torch.zeros_like(param)}
        rule = self.rule(group)
        if rule is not None:
            shapes = group["layout"].shapes(param.shape)
            sizes = [d_out * d_in for k, d_out, d_in in shapes for _ in range(k)]
            state |= rule.allocate(param, self.unit_names(group, name, param), sizes)
        return state

    def rule(self, group: Group) -> RateRule | None:
        return group["rates"]

    def unit_names(self, group: Group, name: str, param: Tensor) -> tuple[str, ...]:
        names: tuple[str, ...] = group["layout"].unit_names(name, param.shape)
        return names

    def step(self, jobs: Sequence[Job], work: MatrixWork, keep: Tensor | None) -> None:
        for planned in self.plan(jobs):
            planned(work, keep)

    def plan(self, jobs: Sequence[Job]) -> Sequence[Planned]:
        return [_LmoStep(jobs)]


class _LmoStep:
    """By sets of parameters that are alike, and by groups of units whose rates a rule sets."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        sets = [job.alike for job in jobs if job.alike is not None and job.row == 0]
        groups = norm_groups(jobs)
        self._before = [group for group in groups if not group.rule.own_dual_norm]
        self._after = [group for group in groups if group.rule.own_dual_norm]
        self._norms = [piece for group in groups for some in group.pieces for norm in some for piece in norm]
        self._chunks = [chunk for some in sets for chunk in some.chunks()]
        self._unit_steps = [piece for some in sets for piece in _unit_steps(some.jobs)]
        joined = [joined for group in groups for joined in group.joined.values()]
        joined += [_join_tensor(some, key) for some in sets if some.small for key in some.jobs[0].state]
        #: state that was put together; where it lies elsewhere since, the plan is made anew
        self.joined = [each for each in joined if each is not None]

    def __call__(self, work: MatrixWork, keep: Tensor | None) -> None:
        for chunk in self._chunks:  # M <- momentum * M + (1 - momentum) * G
            averages, grads = state_and_gradients(chunk, "momentum_buffer")
            if keep is not None:  # a lerp from a number to itself changes nothing
                grads = select_all(keep, grads, averages)
            torch._foreach_lerp_(averages, grads, 1.0 - current_momentum(chunk[0].group))
        norms = iter(work.norms(self._norms) if self._norms else ())
        for group in self._before:
            group.update(norms, keep)
            for chunk in group.chunks:
                group.rule.remember(chunk, keep)
        measured = [group for group in self._after if group.ask_for_duals()]
        for moved, directions in work.directions(self._unit_steps):
            move(moved, directions, keep)
        for group in measured:
            group.update(norms, keep)


def _join_tensor(some: Alike, key: str) -> JoinedState | None:
    """State of small parameters that is as large as they are; numbers of units are a norm group's."""
    first, rule = some.jobs[0], some.jobs[0].group["rates"]
    value, of_units = first.state[key], rule is not None and key in rule.unit_keys
    if of_units or not isinstance(value, Tensor) or value.shape != first.local.shape:
        return None
    joined = join_state(some.jobs, key)
    if joined is not None:
        some.state[key] = joined.whole.view(len(some.jobs), *value.shape)
    return joined


def _unit_steps(jobs: Sequence[Job]) -> list[MatrixJob]:
    """Ask for the unit steps of parameters that are alike, as many at a time as are worked on together."""
    group, shape = jobs[0].group, tuple(jobs[0].param.shape)
    geometry = group["geometry"]
    factors = step_factors(group["layout"], geometry, group["scaling"], group["radius"], shape)
    asked = MatrixJob(jobs, DIRECTIONS, geometry, factors)
    return asked.pieces(directions_at_once(asked))


#: The kinds that a group can name by text.
UPDATES: Final[Mapping[str, Update]] = {"lmo": Lmo(), "adamw": AdamW()}


def norm_groups(jobs: Sequence[Job]) -> list[NormGroup]:
    """The parameters whose units a rule compares with one another, where it asks for any norm: without a gradient too."""
    found: list[tuple[str, RateRule, list[Job]]] = []
    for _, in_group in groupby(jobs, key=lambda job: id(job.group)):
        some = [*in_group]
        rule, name = some[0].group["rates"], some[0].group["norm_group"]
        mates = next((m for other, r, m in found if other == name and (r is rule or r == rule)), None)
        if mates is not None:
            mates += some
        elif rule is not None and (rule.own_dual_norm or rule.norms()):
            found.append((name, rule, some))
    return [NormGroup(rule, members) for _, rule, members in found if any(job.moves for job in members)]


def move(jobs: Sequence[Job], directions: Sequence[Tensor], keep: Tensor | None) -> None:
    """``W <- W - lr * weight_decay * W``, then ``W <- W - lr * direction``, in place; in half precision both at once."""
    if keep is not None:
        directions = select_all(keep, list(directions), [0.0] * len(directions))
    by_group: dict[int, list[int]] = {}
    for i, job in enumerate(jobs):
        by_group.setdefault(id(job.group), []).append(i)
    for some in by_group.values():
        params, steps = [jobs[i].local for i in some], [directions[i] for i in some]
        group, lr, decay = jobs[some[0]].group, jobs[some[0]].lr, jobs[some[0]].group["weight_decay"]
        if params[0].dtype in HALF and (decay != 0.0 or is_stochastic(group, params[0])):
            for i in some:
                move_once_rounded(jobs[i], directions[i], keep)
            continue
        if isinstance(lr, Tensor):
            lr = lr.reshape(())
        if decay != 0.0:
            decayed = lr * decay
            if keep is not None:  # in float64 what is on the device comes out as the host's arithmetic does
                decayed = widened(keep.to(params[0].device)) * decayed
            left = 1.0 - decayed  # of the weights; torch multiplies a list by a tensor in a third of a number's time
            torch._foreach_mul_(params, left.to(params[0]) if isinstance(left, Tensor) else params[0].new_full((), left))
        if isinstance(lr, Tensor):
            same = lr.device == steps[0].device  # to send a rate there would wait for the device
            scaled = torch._foreach_mul(steps, lr) if same else [step * lr for step in steps]
            torch._foreach_sub_(params, scaled)
        else:
            torch._foreach_sub_(params, steps, alpha=lr)
