"""Layer rates as the flat numbers that trainers log."""

from __future__ import annotations

from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.function_space.steps.optimizer_facts import unwrap_optimizer
from layerwise.function_space.watching.unit_rates import unit_rates, unit_scalars
from layerwise.optim import LayerwiseOptimizer


def layerwise_optimizer(optimizer: Any) -> LayerwiseOptimizer:
    """The optimizer inside a framework's wrapper. Raises LayerwiseError where it is not one of layerwise's."""
    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, LayerwiseOptimizer):
        raise LayerwiseError(
            f"the trainer's optimizer is {type(inner).__name__}: layer rates need one of layerwise's, such as lw.Lanton"
        )
    return inner


def rates_to_log(optimizer: Any, prefix: str = "layer") -> dict[str, float]:
    """``{"layer_lr/UNIT": rate, "layer_noise/UNIT": noise}``; no noise where none is measured."""
    return unit_scalars(unit_rates(layerwise_optimizer(optimizer)), prefix)
