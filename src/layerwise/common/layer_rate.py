"""What one unit's learning rate is made of: the one record of it, from the optimizer to every logger."""

from __future__ import annotations

from typing import NamedTuple


class LayerRate(NamedTuple):
    """What the learning rate of one unit is made of: a matrix of a fused or stacked parameter, or all of it.

    Attributes:
        squared_norm: the running average of squared dual norms that the multiplier is made of: with `NoiseAdaptive` of
            differences of gradients, which is their noise, in the gradients' unit squared; with `DualNormAdaptive` of the
            step's direction, relative to white noise of its shape. nan where the rule takes none, or none yet.
        multiplier: of the group's rate.
        lr: the group's learning rate, times its `lr_scale`, times the multiplier.

    Examples:
        >>> rate = lw.LayerRate(squared_norm=4.0, multiplier=0.5, lr=1e-3)
        >>> rate.lr
        0.001
    """

    squared_norm: float
    multiplier: float
    lr: float


def parameter_of(unit: str) -> str:
    """The parameter that a unit is of: `experts.up[3]` is of `experts.up`."""
    return unit.partition("[")[0]
