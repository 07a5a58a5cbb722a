"""The rates that an optimizer gives the units of its parameters, where it has rates of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch.optim import Optimizer


@dataclass(frozen=True)
class UnitRate:
    """The rate that an optimizer gives one unit of a parameter (a matrix of a fused or stacked one, or all of it).

    Attributes:
        noise: what the rate was made of; nan where the optimizer measures none.
        multiplier: of the group's rate.
        lr: the two multiplied, with what FLeRM multiplies them by.
    """

    noise: float
    multiplier: float
    lr: float


def unit_rates(optimizer: Optimizer, lrs: Mapping[str, float] | None = None) -> dict[str, UnitRate]:
    """What an optimizer tells by `layer_rates()` (unit -> noise, multiplier, lr); nothing where it has no such method.

    Args:
        optimizer: any; one that sets rates of its own waits for the device once.
        lrs: the rates of the groups as a step took them, by parameter name; default: as they are.
    """
    told = getattr(optimizer, "layer_rates", None)
    found = {}
    for unit, rate in told().items() if told is not None else ():
        lr = None if lrs is None else lrs.get(unit.partition("[")[0])
        found[unit] = UnitRate(rate.noise, rate.multiplier, rate.lr if lr is None else lr * rate.multiplier)
    return found


def unit_scalars(units: Mapping[str, UnitRate], prefix: str = "layer") -> dict[str, float]:
    """`{"layer_lr/UNIT": rate, "layer_noise/UNIT": noise}`, for loggers; no noise where none is measured."""
    found: dict[str, float] = {}
    for name, unit in units.items():
        found[f"{prefix}_lr/{name}"] = unit.lr
        if not math.isnan(unit.noise):
            found[f"{prefix}_noise/{name}"] = unit.noise
    return found
