"""The rates that an optimizer gives the units of its parameters, where it has rates of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch.optim import Optimizer

from layerwise.common.layer_rate import LayerRate, parameter_of


def unit_rates(optimizer: Optimizer, lrs: Mapping[str, float] | None = None) -> dict[str, LayerRate]:
    """What an optimizer tells by `layer_rates()`, by unit; nothing where it has no such method.

    The one place that asks: a watch's records and `log_layer_rates` are views of this.

    Args:
        optimizer: any; one that sets rates of its own waits for the device once.
        lrs: the rates of the groups as a step took them, by parameter name; default: as they are.
    """
    told = getattr(optimizer, "layer_rates", None)
    rates: dict[str, LayerRate] = {} if told is None else told()
    if lrs is None:
        return rates
    return {
        unit: rate._replace(lr=lrs[parameter] * rate.multiplier) if (parameter := parameter_of(unit)) in lrs else rate
        for unit, rate in rates.items()
    }


def unit_scalars(units: Mapping[str, LayerRate]) -> dict[str, float]:
    """`{"layer_lr/UNIT": rate, "layer_squared_norm/UNIT": ...}`, for loggers; no norm where none is measured."""
    found: dict[str, float] = {}
    for name, unit in units.items():
        found[f"layer_lr/{name}"] = unit.lr
        if not math.isnan(unit.squared_norm):
            found[f"layer_squared_norm/{name}"] = unit.squared_norm
    return found
