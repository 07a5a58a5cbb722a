"""Rate rules: what multiplies the learning rate of each unit.

A rule reads some norms of each unit's gradients, keeps a few numbers per unit, and turns them into a multiplier. All of
it happens on the device, on one concatenated vector for all the units that are compared with one another.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.geometry import Geometry

State = dict[str, Any]


class Reading(NamedTuple):
    """A norm to be taken of each unit of a parameter-shaped tensor."""

    geometry: Geometry
    tensor: Callable[[], Tensor]  # made when it is needed, so that only one is alive at a time
    per_white_noise: bool = False  # divided by the norm of white noise of unit deviation in that shape
    seed: int | Tensor = 0  # of the probes, where the norm is a stochastic estimate
    owner: int | None = None  # the process that has to take it, where only one can
    finish: Callable[[Tensor], Tensor] | None = (
        None  # from the whole tensor to the one whose norm is taken; there
    )


class Deviation(NamedTuple):
    """What one replica's gradient of a parameter differs by from the mean over all replicas, the gradient of the step."""

    owner: int  # the process that kept its own gradient
    replicas: int
    subtract: Callable[[Tensor], Tensor]  # from the whole mean to own gradient minus mean; on the owner alone


@dataclass(frozen=True)
class Gradients:
    """What a rule may look at, for one parameter at one step. All tensors have the parameter's shape."""

    grad: Tensor
    geometry: Geometry
    momentum: Tensor  # the average after this step's gradient went in
    direction_input: Callable[[], Tensor]  # what the step goes along: the average, or Nesterov's look-ahead
    beta: float  # the average's weight of the old
    deviation: Deviation | None = None  # where replicas are watched


class UnitReadings(NamedTuple):
    """One parameter of a norm group."""

    state: State
    readings: Tensor | None  # [number of readings, units]; None where this step had no gradient
    momentum: float  # the weight of the old average in this parameter's group


class RateRule(ABC):
    """Base of the rules that can be given as ``rates=`` to any preset.

    A checkpoint holds a rule's ``repr`` and loads where it is the same: make a rule a frozen dataclass, whose repr has
    all its options.
    """

    def allocate(self, param: Tensor, units: Sequence[str]) -> State:
        """State for one parameter; every rule has ``multiplier``, one float32 entry per unit, 1 at first."""
        return {"multiplier": torch.ones(len(units), dtype=torch.float32, device=param.device)}

    def noise(self, state: State) -> Tensor:
        """The noise measured so far, ``[units]``; nan where there is none."""
        return torch.full_like(state["multiplier"], float("nan"))

    def readings(self, seen: Gradients, state: State) -> list[Reading]:
        """The norms this rule needs of one parameter."""
        return []

    def remember(self, seen: Gradients, state: State, keep: Tensor | None) -> None:
        """Keep what the next step's readings need, unless ``keep`` (a 0-dim bool; None stands for true) forbids it."""

    def update(self, units: Sequence[UnitReadings], keep: Tensor | None) -> None:
        """Set ``multiplier`` in every state of one norm group. Where ``keep`` is false no state may change."""

    def fits(self, group: Mapping[str, Any]) -> None:
        """Raise :class:`LayerwiseError` where this rule cannot serve a group of these options."""

    def check(self, ruled: Sequence[str], others: Sequence[str]) -> None:
        """Raise :class:`LayerwiseError` where the rule names a unit that is neither among those it rules nor the others."""


def gather(units: Sequence[UnitReadings], key: str) -> Tensor:
    device = units[0].state[key].device  # parameters of one model may be on several
    return torch.cat([unit.state[key].to(device) for unit in units])


def scatter(units: Sequence[UnitReadings], key: str, values: Tensor, keep: Tensor | None) -> None:
    """Write one concatenated vector back into the states, where ``keep`` allows it."""
    values = select(keep, values, gather(units, key))
    targets = [unit.state[key] for unit in units]
    torch._foreach_copy_(targets, list(values.split([t.numel() for t in targets])))


def select(keep: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """``new`` where ``keep`` allows it, else ``old``: a choice and no product, so that NaN cannot pass."""
    return new if keep is None else torch.where(keep.to(new.device), new, old)


def stack_readings(units: Sequence[UnitReadings]) -> tuple[Tensor, Tensor]:
    """All readings side by side ``[readings, units]`` and which units have one ``[units]``, bool."""
    device = units[0].state["multiplier"].device
    rows = max(unit.readings.shape[0] for unit in units if unit.readings is not None)
    parts, present = [], []
    for unit in units:
        like = unit.state["multiplier"]
        none = torch.zeros(rows, like.numel(), device=device)
        parts.append(none if unit.readings is None else unit.readings.to(device, torch.float32))
        present.append(torch.full((like.numel(),), unit.readings is not None, device=device))
    return torch.cat(parts, dim=1), torch.cat(present)


def check_number(rule: str, name: str, value: object, low: float, high: float) -> None:
    """Raise :class:`LayerwiseError` unless ``low <= value < high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
        raise LayerwiseError(f"{rule}({name}={value!r}): give a number in [{low:g}, {high:g})")
