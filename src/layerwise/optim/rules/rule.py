"""Rate rules: what multiplies the learning rate of each unit.

A rule asks for some norms of each unit, keeps a few numbers per unit, and turns them into a multiplier. All of it happens
on the device, on one vector for all the units that are compared with one another.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from numbers import Real
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, TypeVar

import torch
from torch import Tensor

from layerwise.common.checked import checked
from layerwise.common.parameter_names import first_few
from layerwise.errors import LayerwiseError
from layerwise.optim.work.job import Job, State, current_momentum, join_state, select
from layerwise.optim.work.local import DualNorm, white_noise_factors


class NormGroup:
    """Units that a rule compares with one another, side by side, in float32."""

    norms: Tensor  # [norms that the rule asked for, units]; 0 for units without a gradient
    present: Tensor  # [units], bool: which have a gradient at this step
    state: Mapping[str, Tensor]  # "multiplier" and the rule's `unit_state`, each [units]: copies
    members: Sequence[Job]  # the parameters whose units they are: set by set, and then those without a gradient

    def __init__(self, rule: RateRule, members: Sequence[Job]) -> None:
        self.rule, resting = rule, [job for job in members if job.alike is None]
        self.sets = [job.alike for job in members if job.alike is not None and job.row == 0]
        self.members = members = [*(job for some in self.sets for job in some.jobs), *resting]
        self.chunks = [chunk for some in self.sets for chunk in some.chunks()]
        wanted = () if rule.own_dual_norm else rule.norms()
        #: of each set, the work on each norm that ``update`` takes, in pieces of parameters that are worked on together
        self.pieces = [[norm.asked_of(some.jobs) for norm in wanted] for some in self.sets]
        late = [job.name for job in members if "multiplier" not in job.state]
        if late:
            raise LayerwiseError(
                f"rates={rule!r} came into the group of {first_few(late)} after the optimizer was made, which keeps nothing "
                "for it: give rates= when you make the optimizer (a group's own rates=None turns the rule off at any step)"
            )
        self._device = members[0].state["multiplier"].device  # parameters of one model may be on several
        #: (the first of them, how many units) of each set, and of each without a gradient
        self._blocks = [(some.jobs[0], sum(map(_units_of, some.jobs))) for some in self.sets]
        self._blocks += [(job, _units_of(job)) for job in resting]
        self.present = self._repeated([job.moves for job, _ in self._blocks], torch.bool)
        #: [units], where the unit steps write the dual norms of their directions, if the rule wants those; and of each job
        self.duals: Tensor | None = None
        self._own_duals: Sequence[Tensor] = ()
        if rule.own_dual_norm:
            factors = [factor for job in members for factor in _over_white_noise(job)]
            self._over_white_noise = torch.tensor(factors, dtype=torch.float32, device=self._device)
            self.duals = torch.zeros_like(self._over_white_noise)
            self._own_duals = self.duals.split([_units_of(job) for job in members])
        #: by its name the state that could be joined, and None where it is apart
        self.joined = {key: join_state(members, key) for key in rule.unit_keys}
        for key, found in self.joined.items():
            parts = found.whole.split([units for _, units in self._blocks]) if found else ()
            for some, part in zip(self.sets, parts, strict=False):
                some.state[key] = part.view(len(some.jobs), -1)

    @property
    def momentum(self) -> Tensor:
        """``[units]``: the weight of the old average in their groups."""
        return self._repeated([current_momentum(job.group) for job, _ in self._blocks], torch.float32)

    def _repeated(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """The value of each block for all its units; neighbours that are equal in one launch."""
        counts: list[tuple[float, int]] = []
        for value, (_, units) in zip(values, self._blocks, strict=True):
            before = counts.pop()[1] if counts and counts[-1][0] == value else 0
            counts.append((value, before + units))
        return torch.cat([torch.full((n,), value, dtype=dtype, device=self._device) for value, n in counts])

    def ask_for_duals(self) -> bool:
        """Let the unit steps of this step write their directions' dual norms, or not, as the rule's ``every`` says."""
        self._taken: int = self.members[0].group.get("rate_steps", 0)
        due = torch.compiler.is_compiling() or self._taken % self.rule.every == 0
        if due and self.duals is not None:  # of a sharded parameter one process fills them in, and the others add zero
            self.duals.zero_()
        for job, own in zip(self.members, self._own_duals, strict=True):
            job.dual = own if due else None
        return due

    def update(self, norms_asked: Iterator[Tensor], keep: Tensor | None) -> None:
        """Let the rule set the state of all units from the norms of this step, where ``keep`` allows it."""
        if self.duals is None:
            self.norms = self._side_by_side(norms_asked)
        else:
            self.norms = (self.duals * self._over_white_noise)[None]
            if torch.compiler.is_compiling():  # it asks at every step: to branch would be to compile several
                due = torch.full((), self._taken, device=self._device) % self.rule.every == 0
                keep = due if keep is None else keep.to(due.device) & due
        self.state = {
            key: torch.cat([job.state[key].to(self._device) for job in self.members])
            if joined is None
            else joined.whole.clone()
            for key, joined in self.joined.items()
        }
        for key, values in self.rule.update(self).items():
            chosen, joined = select(keep, values, self.state[key]), self.joined[key]
            if joined is not None:
                joined.whole.copy_(chosen)
            else:
                targets = [job.state[key] for job in self.members]
                torch._foreach_copy_(targets, list(chosen.split([target.numel() for target in targets])))

    def _side_by_side(self, norms_asked: Iterator[Tensor]) -> Tensor:
        """``[norms, units]``."""
        parts = [
            torch.stack([torch.cat([next(norms_asked) for _ in norm]) for norm in pieces]).flatten(1)
            for pieces in self.pieces
        ]
        resting = sum(units for job, units in self._blocks if not job.moves)
        if resting:
            parts.append(parts[0].new_zeros(len(parts[0]), resting))
        return torch.cat([part.to(self._device) for part in parts], dim=1).float()


def _units_of(job: Job) -> int:
    return int(job.state["multiplier"].numel())


def _over_white_noise(job: Job) -> Iterator[float]:
    """Of each unit, one over the dual norm of white noise in its shape."""
    layout, shape = job.group["layout"], tuple(job.param.shape)
    factors = white_noise_factors(layout, job.group["geometry"], shape)
    for factor, (units, _, _) in zip(factors, layout.shapes(shape), strict=True):
        yield from [factor] * units


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """The value at which half of the weight lies below or at it.

    A mean would follow its largest entries: one unit of a gradient ten times the others' lifts it ten-fold. A median that
    counts units would follow the many: four thousand depthwise kernels of four taps outvote ten matrices that hold all the
    weights. Weighted by the number of entries it is the value of the unit that the model's middle weight lies in.

    Args:
        values: ``[units]``, at least 0.
        weights: ``[units]``, at least 0; a unit of weight 0 is left out.

    Returns:
        0-dim, one of ``values``; the least where all weights are 0.

    Examples:
        >>> weighted_median(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([1.0, 1.0, 3.0]))
        tensor(9.)
    """
    ordered, order = values.sort()
    total = weights.gather(0, order).cumsum(0)
    middle = torch.searchsorted(total, total[-1:] / 2)  # the first that reaches it: one that has weight
    # gathered: an index of no dimension would wait for the device
    return ordered.gather(0, middle)[0]


#: The weight of an old average.
Fraction = Annotated[float, "a number in [0, 1)", lambda number: 0 <= number < 1]
NonNegative = Annotated[float, "a number in [0, inf)", lambda number: 0 <= number < math.inf]


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

    #: what is kept of each unit beside its multiplier: names of float32 vectors [units], zero at first; "size" is the number
    #: of its entries
    unit_state: ClassVar[tuple[str, ...]] = ()
    #: whether ``update`` gets the dual norm of the direction itself, over its value on white noise, as its one norm. The
    #: unit step gives it on the way (``<u, lmo(u)>``), so ``update`` runs after the step, for the next one.
    own_dual_norm: ClassVar[bool] = False
    #: steps from one such measurement to the next: at the others ``update`` does not run
    every: int = 1
    #: whether ``LayerwiseOptimizer.hold_half`` has to be called before each step
    needs_halves: bool = False
    #: whether ``LayerwiseOptimizer.watch_replicas`` has to be called before training
    needs_replicas: bool = False

    def __post_init__(self) -> None:
        """Of a dataclass: numbers as floats where the default is one, as a checkpoint tells rules apart by their text."""
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if isinstance(each.default, float) and isinstance(value, Real):
                object.__setattr__(self, each.name, float(value))

    @property
    def unit_keys(self) -> tuple[str, ...]:
        """Names of all that is kept of each unit."""
        return ("multiplier", *self.unit_state)

    def allocate(self, param: Tensor, units: Sequence[str], sizes: Sequence[int]) -> State:
        """State for one parameter: ``multiplier``, one float32 entry per unit, 1 at first, and ``unit_state``.

        Args:
            param: the whole parameter.
            units: names of its units.
            sizes: numbers of their entries.
        """
        multiplier = torch.ones(len(units), dtype=torch.float32, device=param.device)
        state = {"multiplier": multiplier} | {key: torch.zeros_like(multiplier) for key in self.unit_state}
        if "size" in state:
            state["size"].copy_(torch.tensor(sizes, device="cpu"))
        return state

    def norms(self) -> Sequence[DualNorm]:
        """The norms this rule needs of every parameter."""
        return ()

    def update(self, units: NormGroup) -> Mapping[str, Tensor]:
        """New values of ``multiplier`` and ``unit_state``, from the old ones and the norms of one norm group."""
        return {}

    def remember(self, jobs: Sequence[Job], keep: Tensor | None) -> None:
        """Keep what the next step's norms of these alike jobs need, unless ``keep`` (a 0-dim bool; None: true) is false."""

    def squared_norm(self, state: State) -> Tensor:
        """The average of squared norms that multipliers are made of, ``[units]``; nan where there is none."""
        return torch.full_like(state["multiplier"], float("nan"))

    def fits(self, group: Mapping[str, Any]) -> None:
        """Raise :class:`LayerwiseError` where this rule cannot serve a group of these options."""

    def check(self, ruled: Sequence[str], others: Sequence[str]) -> None:
        """Raise :class:`LayerwiseError` where the rule names a unit that is neither among those it rules nor the others."""


def needs_replicas(group: Mapping[str, Any]) -> bool:
    """Whether the noise of a group is measured between data-parallel replicas."""
    rule: RateRule | None = group["update"].rule(group)
    return rule is not None and rule.needs_replicas


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
