"""Rate rules: what multiplies the learning rate of each unit.

A rule asks for some norms of each unit, keeps a few numbers per unit, and turns them into a multiplier. All of it happens
on the device, on one vector for all the units that are compared with one another.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from layerwise.common.checked import checked
from layerwise.errors import LayerwiseError
from layerwise.optim.work.job import DualNorm, Job, State, lay_side_by_side, select, side_by_side


@dataclass(frozen=True, slots=True)
class NormGroup:
    """Units that a rule compares with one another, side by side, in float32."""

    norms: Tensor  # [norms that the rule asked for, units]; 0 for units without a gradient
    present: Tensor  # [units], bool: which have a gradient at this step
    momentum: Tensor  # [units]: the weight of the old average in their groups
    state: Mapping[str, Tensor]  # "multiplier" and the rule's `unit_state`, each [units]: copies
    members: Sequence[Job]  # the parameters whose units they are, in order

    @classmethod
    def of(cls, members: Sequence[Job], keys: Sequence[str]) -> NormGroup | None:
        """Side by side: the norms of all ``members``, and their state under ``keys``; None where there is no norm."""
        device = members[0].state["multiplier"].device  # parameters of one model may be on several
        runs = _runs(members)
        like = next((run.norms for run in runs if run.norms is not None), None)
        if like is None:
            return None
        zeros = like.new_zeros(len(like), 1)
        pieces = [
            zeros.expand(-1, sum(run.units))
            if run.norms is None
            else run.norms[:, run.start : run.start + len(run.units)].flatten(1)
            for run in runs
        ]
        counts = [sum(run.units) for run in runs]
        return cls(
            torch.cat([piece.to(device) for piece in pieces], dim=1).float(),
            _repeated([run.norms is not None for run in runs], counts, torch.bool, device),
            _repeated([run.momentum for run in runs], counts, torch.float32, device),
            {key: _side_by_side(members, key) for key in keys},
            members,
        )

    def write(self, new: Mapping[str, Tensor], keep: Tensor | None) -> None:
        """Put new values of the state into the parameters' own, where ``keep`` allows it."""
        for key, values in new.items():
            chosen, whole = select(keep, values, self.state[key]), side_by_side(self.members, key)
            if whole is not None:
                whole.copy_(chosen)
                continue
            targets = [job.state[key] for job in self.members]
            torch._foreach_copy_(targets, list(chosen.split([target.numel() for target in targets])))


class _Run(NamedTuple):
    """Neighbours among the members whose norms are neighbours too."""

    norms: Tensor | None  # [norms, jobs, units] of the set that they are in; None: without a gradient
    start: int  # the first of them there
    momentum: float
    units: list[int]  # of each of them


def _runs(members: Sequence[Job]) -> list[_Run]:
    runs = [_Run(None, 0, 0.0, [])]
    for job in members:
        norms = None if job.alike is None else job.alike.norms
        last, momentum = runs[-1], job.group["momentum"]
        if norms is None:
            runs.append(_Run(None, 0, momentum, [job.state["multiplier"].numel()]))
        elif last.norms is norms and last.start + len(last.units) == job.row and last.momentum == momentum:
            last.units.append(norms.shape[2])
        else:
            runs.append(_Run(norms, job.row, momentum, [norms.shape[2]]))
    return runs[1:]


def _repeated(
    values: Sequence[float], counts: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Each value so many times; neighbours that are equal in one launch."""
    runs: list[tuple[float, int]] = []
    for value, count in zip(values, counts, strict=True):
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + count)
        else:
            runs.append((value, count))
    return torch.cat([torch.full((count,), value, dtype=dtype, device=device) for value, count in runs])


def _side_by_side(members: Sequence[Job], key: str) -> Tensor:
    """A copy of the state of all members under a key, as one vector.

    Each member's own becomes a part of another one, so that what is written there is in their state at once, and the next
    step finds it: putting many small vectors together, and writing them back, takes longer than all that a rule computes.
    """
    whole = side_by_side(members, key)
    if whole is not None:
        return whole.clone()
    device = members[0].state["multiplier"].device
    whole = torch.cat(
        [own if own.device == device else own.to(device) for own in (m.state[key] for m in members)]
    )
    if not torch.compiler.is_compiling() and all(
        job.local is job.param and job.local.device == device for job in members
    ):
        lay_side_by_side(members, key, whole.clone())
    return whole


class RateRule(ABC):
    """Base of the rules that can be given as ``rates=`` to any optimizer.

    A checkpoint holds a rule's ``repr`` and loads where it is the same: make a rule a frozen dataclass, whose repr has
    all its options.

    Examples:
        Rates that fall with the norm of the gradient, each unit against the mean of its norm group:

        >>> from dataclasses import dataclass
        >>> import torch
        >>> import layerwise as lw
        >>> @dataclass(frozen=True)
        ... class ByGradientNorm(lw.RateRule):
        ...     power: float = 0.5
        ...
        ...     def norms(self):
        ...         return [lw.DualNorm(lambda job: job.grad)]
        ...
        ...     def update(self, units):
        ...         share = units.norms[0] / units.norms[0][units.present].mean()
        ...         rate = share.clamp(min=0.1) ** -self.power
        ...         return {"multiplier": torch.where(units.present, rate, units.state["multiplier"])}
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> optimizer = lw.DMuon(lw.param_groups(model), rates=ByGradientNorm())
    """

    #: what is kept of each unit beside its multiplier: names of float32 vectors [units], zero at first
    unit_state: ClassVar[tuple[str, ...]] = ()
    #: whether ``update`` gets the dual norm of the direction itself, over its value on white noise, as its one norm. The
    #: unit step gives it on the way (``<u, lmo(u)>``), so ``update`` runs after the step, for the next one.
    own_dual_norm: ClassVar[bool] = False
    #: whether ``LayerwiseOptimizer.watch_replicas`` has to be called before training
    needs_replicas: bool = False

    def allocate(self, param: Tensor, units: Sequence[str], sizes: Sequence[int]) -> State:
        """State for one parameter: ``multiplier``, one float32 entry per unit, 1 at first, and ``unit_state``.

        Args:
            param: the whole parameter.
            units: names of its units.
            sizes: numbers of their entries.
        """
        multiplier = torch.ones(len(units), dtype=torch.float32, device=param.device)
        return {"multiplier": multiplier} | {key: torch.zeros_like(multiplier) for key in self.unit_state}

    def norms(self) -> Sequence[DualNorm]:
        """The norms this rule needs of every parameter."""
        return ()

    def update(self, units: NormGroup) -> Mapping[str, Tensor]:
        """New values of ``multiplier`` and ``unit_state``, from the old ones and the norms of one norm group."""
        return {}

    def remember(self, jobs: Sequence[Job], keep: Tensor | None) -> None:
        """Keep what the next step's norms of these alike jobs need, unless ``keep`` (a 0-dim bool; None: true) is false."""

    def noise(self, state: State) -> Tensor:
        """The noise measured so far, ``[units]``; nan where there is none."""
        return torch.full_like(state["multiplier"], float("nan"))

    def fits(self, group: Mapping[str, Any]) -> None:
        """Raise :class:`LayerwiseError` where this rule cannot serve a group of these options."""

    def check(self, ruled: Sequence[str], others: Sequence[str]) -> None:
        """Raise :class:`LayerwiseError` where the rule names a unit that is neither among those it rules nor the others."""


def needs_replicas(group: Mapping[str, Any]) -> bool:
    """Whether the noise of a group is measured between data-parallel replicas."""
    rule: RateRule | None = group["update"].rule(group)
    return rule is not None and rule.needs_replicas


def check_number(rule: str, name: str, value: object, low: float, high: float) -> None:
    """Raise :class:`LayerwiseError` unless ``low <= value < high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
        raise LayerwiseError(f"{rule}({name}={value!r}): give a number in [{low:g}, {high:g})")


_RULES: Final[dict[str, type[RateRule]]] = {}
_Rule = TypeVar("_Rule", bound=type[RateRule])


@checked
def register_rule(name: str) -> Callable[[_Rule], _Rule]:
    """Give a rate rule the name by which a config calls it; above its class. A rule given as an object needs none.

    Examples:
        >>> @lw.register_rule("half_speed")
        ... class HalfSpeed(lw.RateRule):
        ...     def allocate(self, param, units, sizes):
        ...         return {"multiplier": super().allocate(param, units, sizes)["multiplier"] / 2}
        >>> lw.rate_rules()["half_speed"].__name__
        'HalfSpeed'
        >>> optimizer = lw.DMuon(lw.param_groups(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))), rates=HalfSpeed())
        >>> optimizer.layer_rates()["0.weight"].multiplier
        0.5
    """

    def register(cls: _Rule) -> _Rule:
        _RULES[name] = checked(cls)
        return cls

    return register


def rate_rules() -> Mapping[str, type[RateRule]]:
    """All registered rate rules by name.

    Examples:
        >>> lw.rate_rules()["norm_adaptive"].__name__
        'NormAdaptive'
    """
    return MappingProxyType(_RULES)
