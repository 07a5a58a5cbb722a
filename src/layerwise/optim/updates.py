"""Kinds of update: what a parameter's state is, and what one step does to it.

A parameter group names its kind with ``update``: ``"lmo"``, ``"adamw"``, or an object of a class of one's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from layerwise.errors import LayerwiseError
from layerwise.optim.rounding import HALF, is_stochastic, move_once_rounded, store
from layerwise.optim.rules.rule import NormGroup, RateRule
from layerwise.optim.scaling import step_factors
from layerwise.optim.work.job import (
    DualNorms,
    Group,
    Job,
    MatrixJob,
    MatrixWork,
    State,
    norm_factors,
    select,
)

_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
#: Momentum of many small tensors goes in one launch; a chunk bounds the copies that `keep` makes.
CHUNK_BYTES = 64 * 2**20


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

    #: group options that this kind does not read: giving one warns
    unused: ClassVar[tuple[str, ...]] = ("momentum", "nesterov", "scaling", "radius", "rates")

    @abstractmethod
    def allocate(self, group: Group, name: str, param: Tensor) -> State:
        """State for one parameter; tensors in it keep their keys, shapes and dtypes."""

    @abstractmethod
    def step(self, jobs: Sequence[Job], work: MatrixWork, keep: Tensor | None) -> None:
        """Change all parameters of this kind, in place, that have a gradient (``job.moves``)."""

    def rule(self, group: Group) -> RateRule | None:
        """What sets the rates of a group's units, if anything does."""
        return None

    def unit_names(self, group: Group, name: str, param: Tensor) -> tuple[str, ...]:
        """Names of a parameter's units: here it is one as a whole."""
        return (name,)


@dataclass(frozen=True, repr=False)
class AdamW(Update):
    """torch's AdamW, called as a function on our state.

    Of a float16 parameter in float32 throughout: ``eps`` and small second moments are 0 in float16, and the step NaN.
    """

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
        together: dict[tuple[int, torch.dtype], list[Job]] = {}
        for job in jobs:
            if job.moves:
                together.setdefault((id(job.group), job.local.dtype), []).append(job)
        for members in together.values():
            _adamw(members, keep)


def _adamw(jobs: Sequence[Job], keep: Tensor | None) -> None:
    """Of jobs of one group and one dtype. In float32 where the weights are not enough, and then rounded once."""
    group, lr, first = jobs[0].group, jobs[0].lr, jobs[0].local
    wide = first.dtype == torch.float16 or is_stochastic(group, first)
    params = [job.local.float() if wide else job.local for job in jobs]
    moments = [
        [job.state[key].to(param.dtype) for job, param in zip(jobs, params, strict=True)] for key in _MOMENTS
    ]
    # The fused kernel can be told on the device to do nothing, which is what `keep` needs, and rounds bfloat16 once.
    fused = keep is not None or isinstance(lr, Tensor) or first.dtype == torch.bfloat16
    adamw(
        params,
        [job.grad.to(param.dtype) for job, param in zip(jobs, params, strict=True)],
        moments[0],
        moments[1],
        [],
        [job.state["step"] for job in jobs],
        fused=fused or None,
        found_inf=None if keep is None else 1.0 - keep.float(),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for i, (job, param) in enumerate(zip(jobs, params, strict=True)):
        for key, values in zip(_MOMENTS, moments, strict=True):
            if wide and job.local.dtype == torch.bfloat16:
                job.state[key].copy_(values[i])
            else:  # the same tensor, unless the model was cast after the optimizer was made
                job.state[key] = values[i]
        if wide:
            store(job, param)


@dataclass(frozen=True, repr=False)
class Lmo(Update):
    """A unit step of the momentum in each unit's own norm, at each unit's own rate.

    LMO: the linear minimisation oracle of the norm's unit ball, as Scion (arXiv 2502.07529) calls the unit step.
    """

    unused = ()

    def __repr__(self) -> str:
        return "lmo"

    def allocate(self, group: Group, name: str, param: Tensor) -> State:
        try:
            _factors(group, param)  # fails here, not in the first step
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
        for job in jobs:
            if "base_momentum" in job.group:  # OneCycleLR and CyclicLR move Adam's first beta: so ours
                job.group["momentum"] = job.group["betas"][0]
        moving = [job for job in jobs if job.moves]
        update_momentum(moving, keep)
        ruled = [job for job in jobs if job.group["rates"] is not None]
        if ruled:
            update_rates(ruled, work, keep)
        directions = [_direction(job) for job in moving]
        for i, direction in work.directions(directions):
            move(moving[i], direction, keep)
        learn_rates(ruled, directions, keep)


def _direction(job: Job) -> MatrixJob:
    """Ask for a parameter's unit steps, and where its rule wants them for their dual norms."""
    group, rule = job.group, job.group["rates"]
    layout, geometry = group["layout"], group["geometry"]
    dual = None
    if rule is not None and rule.own_dual_norm:
        values = torch.zeros_like(job.state["multiplier"], device=job.local.device)
        dual = DualNorms(values, norm_factors(layout, geometry, tuple(job.param.shape), True))
    return MatrixJob(
        job.param,
        layout,
        geometry,
        job.direction_input,
        _factors(group, job.param),
        job.state.get("multiplier"),
        dual=dual,
    )


#: The kinds that a group can name by text.
UPDATES: Final[Mapping[str, Update]] = {"lmo": Lmo(), "adamw": AdamW()}


def _factors(group: Group, param: Tensor) -> tuple[float, ...]:
    shape = tuple(param.shape)
    return step_factors(group["layout"], group["geometry"], group["scaling"], group["radius"], shape)


def update_momentum(jobs: Sequence[Job], keep: Tensor | None) -> None:
    """``M <- momentum * M + (1 - momentum) * G``, in place: many small tensors in one launch."""
    by_weight: dict[tuple[float, int], list[Job]] = {}
    held = 0
    for job in jobs:
        held += job.grad.numel() * job.grad.element_size()
        by_weight.setdefault((1.0 - job.group["momentum"], held // CHUNK_BYTES), []).append(job)
    for (weight, _), chunk in by_weight.items():
        averages = [job.state["momentum_buffer"] for job in chunk]
        grads = [job.grad.to(average.dtype) for job, average in zip(chunk, averages, strict=True)]
        if keep is not None:  # lerp from a number to itself changes nothing
            grads = [select(keep, grad, average) for grad, average in zip(grads, averages, strict=True)]
        torch._foreach_lerp_(averages, grads, weight)


def update_rates(jobs: Sequence[Job], work: MatrixWork, keep: Tensor | None) -> None:
    """Take the norms that the rate rules ask for, and let each set the multipliers of every norm group.

    ``jobs``: all that have a rule, those without a gradient too, whose units are compared with the others'.
    """
    moving = [job for job in jobs if job.moves]
    asked = [(job.param, norm) for job in moving for norm in job.group["rates"].norms(job)]
    if asked:
        found: dict[Tensor, list[Tensor]] = {}
        for (param, _), norm in zip(asked, work.norms([norm for _, norm in asked]), strict=True):
            found.setdefault(param, []).append(norm)
        _update_multipliers(jobs, found, keep)
    for job in moving:
        job.group["rates"].remember(job, keep)


def learn_rates(jobs: Sequence[Job], directions: Sequence[MatrixJob], keep: Tensor | None) -> None:
    """Let the rules that want the directions' own dual norms set the multipliers of the next step."""
    found = {asked.param: [asked.dual.values] for asked in directions if asked.dual is not None}
    if found:
        _update_multipliers(jobs, found, keep)


def _update_multipliers(
    jobs: Sequence[Job], found: Mapping[Tensor, list[Tensor]], keep: Tensor | None
) -> None:
    """``found``: norms by parameter. ``jobs``: all that have a rule."""
    for rule, members in norm_groups(jobs):
        if any(job.param in found for job in members):
            units = NormGroup.of(members, found, ("multiplier", *rule.unit_state))
            units.write(rule.update(units), keep)


def norm_groups(jobs: Sequence[Job]) -> list[tuple[RateRule, list[Job]]]:
    """Each rule with the parameters whose units it compares with one another."""
    found: list[tuple[str, RateRule, list[Job]]] = []
    for job in jobs:
        rule, name = job.group["rates"], job.group["norm_group"]
        mates = next((m for other, r, m in found if other == name and (r is rule or r == rule)), None)
        if mates is None:
            found.append((name, rule, [job]))
        else:
            mates.append(job)
    return [(rule, members) for _, rule, members in found]


def move(job: Job, direction: Tensor, keep: Tensor | None) -> None:
    """``W <- W - lr * weight_decay * W``, then ``W <- W - lr * direction``, in place; in half precision both at once."""
    param, lr, decay = job.local, job.lr, job.group["weight_decay"]
    if param.dtype in HALF and (decay != 0.0 or is_stochastic(job.group, param)):
        move_once_rounded(job, direction, keep)
        return
    if isinstance(lr, Tensor):
        lr = lr.reshape(())
    if decay != 0.0:
        # In float64 what is on the device comes out as the host's arithmetic does.
        shrink = lr * decay if keep is None else keep.to(param.device).double() * (lr * decay)
        param.mul_(1.0 - shrink)
    if keep is not None:
        direction = select(keep, direction, 0.0)
    if isinstance(lr, Tensor):
        param.sub_(direction * lr)
    else:
        param.sub_(direction, alpha=lr)
