"""Kinds of update: what a parameter's state is, and what one step does to it.

A parameter group names its kind with ``update``: ``"lmo"``, ``"adamw"``, or an object of a class of one's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from layerwise.common.tensors import in_dtypes_of
from layerwise.errors import LayerwiseError
from layerwise.optim.rounding import HALF, is_stochastic, move_once_rounded, store
from layerwise.optim.rules.rule import NormGroup, RateRule
from layerwise.optim.scaling import step_factors
from layerwise.optim.work.job import (
    DIRECTIONS,
    Alike,
    Group,
    Job,
    MatrixJob,
    MatrixWork,
    State,
    select_all,
    state_and_gradients,
)

_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
#: Many small tensors go in one launch; a chunk bounds the copies that `keep` makes.
CHUNK_BYTES = 64 * 2**20
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
            at_once = ADAMW_BYTES if members[0].local.device.type == "cpu" else CHUNK_BYTES
            for chunk in [members] if keep is not None else chunks(members, at_once):
                _adamw(chunk, keep)


def _adamw(jobs: Sequence[Job], keep: Tensor | None) -> None:
    """Of jobs of one group and one dtype. In float32 where the weights are not enough, and then rounded once."""
    group, lr, first = jobs[0].group, jobs[0].lr, jobs[0].local
    wide = first.dtype in HALF and (first.dtype == torch.float16 or is_stochastic(group, first))
    params = [job.local.float() if wide else job.local for job in jobs]
    moments = [in_dtypes_of(params, [job.state[key] for job in jobs]) for key in _MOMENTS]
    # The fused kernel can be told on the device to do nothing, which is what `keep` needs, and rounds bfloat16 once.
    fused = keep is not None or isinstance(lr, Tensor) or first.dtype == torch.bfloat16
    adamw(
        params,
        in_dtypes_of(params, [job.grad for job in jobs]),
        moments[0],
        moments[1],
        [],
        [job.state["step"] for job in jobs],
        foreach=not fused and len(jobs) > 1,
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
        together = [job.alike for job in jobs if job.alike is not None and job.row == 0]
        update_momentum(together, keep)
        ruled = [some for some in together if some.jobs[0].group["rates"] is not None]
        groups = norm_groups(jobs) if ruled else []
        if ruled:
            take_norms(ruled, work)
            update_multipliers([pair for pair in groups if not pair[0].own_dual_norm], keep)
            remember(ruled, keep)
        for moved, directions in work.directions([_unit_steps(some.jobs) for some in together]):
            move(moved, directions, keep)
        if after := [pair for pair in groups if pair[0].own_dual_norm]:
            update_multipliers(after, keep)


def _unit_steps(jobs: Sequence[Job]) -> MatrixJob:
    """Ask for the unit steps of parameters that are alike."""
    group, shape = jobs[0].group, tuple(jobs[0].param.shape)
    geometry = group["geometry"]
    factors = step_factors(group["layout"], geometry, group["scaling"], group["radius"], shape)
    return MatrixJob(jobs, DIRECTIONS, geometry, factors)


#: The kinds that a group can name by text.
UPDATES: Final[Mapping[str, Update]] = {"lmo": Lmo(), "adamw": AdamW()}


def chunks(jobs: Sequence[Job], limit: int) -> list[list[Job]]:
    """In order, each of gradients of at most ``limit`` bytes; a larger one comes alone."""
    found: list[list[Job]] = []
    held = 0
    for job in jobs:
        size = job.grad.nbytes
        if not found or held + size > limit:
            found.append([])
            held = 0
        found[-1].append(job)
        held += size
    return found


def in_chunks(together: Sequence[Alike]) -> Iterator[list[Job]]:
    """The jobs of every set: small ones at once, others by so many bytes of gradients."""
    for some in together:
        yield from [some.jobs] if some.small else chunks(some.jobs, CHUNK_BYTES)


def update_momentum(together: Sequence[Alike], keep: Tensor | None) -> None:
    """``M <- momentum * M + (1 - momentum) * G``, in place."""
    for chunk in in_chunks(together):
        averages, grads = state_and_gradients(chunk, "momentum_buffer")
        if keep is not None:  # a lerp from a number to itself changes nothing
            grads = select_all(keep, grads, averages)
        torch._foreach_lerp_(averages, grads, 1.0 - chunk[0].group["momentum"])


def norm_groups(jobs: Sequence[Job]) -> list[tuple[RateRule, list[Job]]]:
    """Each rule with the parameters whose units it compares with one another: without a gradient too."""
    found: list[tuple[str, RateRule, list[Job]]] = []
    for _, in_group in groupby(jobs, key=lambda job: id(job.group)):
        some = [*in_group]
        rule, name = some[0].group["rates"], some[0].group["norm_group"]
        mates = next((m for other, r, m in found if other == name and (r is rule or r == rule)), None)
        if mates is not None:
            mates += some
        elif rule is not None:
            found.append((name, rule, some))
    return [(rule, members) for _, rule, members in found]


def take_norms(together: Sequence[Alike], work: MatrixWork) -> None:
    """Those that the rate rules ask for; or where the unit steps will write the dual norms of their directions."""
    rules: list[RateRule] = [some.jobs[0].group["rates"] for some in together]
    wanted = [() if rule.own_dual_norm else rule.norms() for rule in rules]
    pairs = list(zip(together, wanted, strict=True))
    norms = iter(work.norms([norm.asked_of(some.jobs) for some, asked in pairs for norm in asked]))
    for rule, (some, asked) in zip(rules, pairs, strict=True):
        jobs = some.jobs
        if asked:
            some.norms = torch.stack([next(norms) for _ in asked])
        elif rule.own_dual_norm:
            counts = (1, len(jobs), jobs[0].state["multiplier"].numel())
            some.norms = torch.zeros(counts, dtype=torch.float32, device=jobs[0].local.device)
            for job, own in zip(jobs, some.norms[0].unbind(), strict=True):
                job.dual = own


def update_multipliers(groups: Sequence[tuple[RateRule, list[Job]]], keep: Tensor | None) -> None:
    """Let the rules set those of every norm group of which there is any norm."""
    for rule, members in groups:
        units = NormGroup.of(members, ("multiplier", *rule.unit_state))
        if units is not None:
            units.write(rule.update(units), keep)


def remember(together: Sequence[Alike], keep: Tensor | None) -> None:
    """Let the rules keep what the next step's norms need."""
    for chunk in in_chunks(together):
        chunk[0].group["rates"].remember(chunk, keep)


def move(jobs: Sequence[Job], directions: Sequence[Tensor], keep: Tensor | None) -> None:
    """``W <- W - lr * weight_decay * W``, then ``W <- W - lr * direction``, in place; in half precision both at once."""
    if keep is not None:
        directions = select_all(keep, list(directions), [0.0] * len(directions))
    by_group: dict[int, list[int]] = {}
    for i, job in enumerate(jobs):
        by_group.setdefault(id(job.group), []).append(i)
    for some in by_group.values():
        lr, decay = jobs[some[0]].lr, jobs[some[0]].group["weight_decay"]
        params, steps = [jobs[i].local for i in some], [directions[i] for i in some]
        if params[0].dtype in HALF and (decay != 0.0 or is_stochastic(jobs[some[0]].group, params[0])):
            for i in some:
                move_once_rounded(jobs[i], directions[i], keep)
            continue
        if isinstance(lr, Tensor):
            lr = lr.reshape(())
        left = 1.0 - lr * decay  # of the weights
        if keep is not None and decay != 0.0:
            # In float64 what is on the device comes out as the host's arithmetic does.
            left = 1.0 - keep.to(params[0].device).double() * (lr * decay)
        if decay != 0.0:
            torch._foreach_mul_(params, left.to(params[0]) if isinstance(left, Tensor) else left)
        if isinstance(lr, Tensor):
            same = lr.device == steps[0].device  # to send a rate there would wait for the device
            scaled = torch._foreach_mul(steps, lr) if same else [step * lr for step in steps]
            torch._foreach_sub_(params, scaled)
        else:
            torch._foreach_sub_(params, steps, alpha=lr)
