"""What one unit's learning rate is made of: the one record of it, from the optimizer to every logger."""

from __future__ import annotations

from typing import NamedTuple


class LayerRate(NamedTuple):
    """What the learning rate of one unit is made of: a matrix of a fused or stacked parameter, or all of it.

    Attributes:
        noise: what the rate was made of: H of `NoiseAdaptive`, the averaged squared dual norm; nan where none is measured.
        multiplier: of the group's rate.
        lr: the group's learning rate, times its `lr_scale`, times the multiplier.

    Examples:
        >>> rate = lw.LayerRate(noise=4.0, multiplier=0.5, lr=1e-3)
        >>> rate.lr
        0.001
    """

    noise: float
    multiplier: float
    lr: float


def parameter_of(unit: str) -> str:
    """The parameter that a unit is of: `experts.up[3]` is of `experts.up`."""
    return unit.partition("[")[0]
