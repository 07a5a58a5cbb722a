"""`decay="constant"`: decoupled weight decay that does not follow a matched rate, and all that it takes.

With `W <- W - lr * wd * W - lr * u`, `"scaled"` (the paper's) measures and matches the whole step, so a matched rate
multiplies the decay too. `"constant"` measures and matches `lr * u` alone: `lr * wd * W` is taken out of the update, and
`wd` is divided by what multiplies `lr`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from layerwise.errors import LayerwiseError
from layerwise.function_space.steps.optimizer_facts import decoupled, group_of, learning_rates

Decay = Literal["scaled", "constant"]


def constant_decay(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """`lr * weight_decay` of each parameter that has decay: that much of the weights is no part of the update.

    Raises:
        LayerwiseError: an optimizer whose decay is not decoupled.
    """
    found, lrs = {}, learning_rates(optimizer, parameters)
    for name, group in group_of(optimizer, parameters).items():
        if group.get("weight_decay"):
            if not decoupled(optimizer, group):
                raise LayerwiseError(
                    f"decay='constant' needs decoupled weight decay, and {type(optimizer).__name__} adds its own to the "
                    "gradient: use decay='scaled' or AdamW"
                )
            found[name] = lrs[name] * float(group["weight_decay"])
    return found


def kept_constant(group: Mapping[str, Any], multiplier: float) -> float:
    """The weight decay of a group whose rate is multiplied, such that `lr * weight_decay` stays."""
    return group["weight_decay"] / multiplier if multiplier else 0.0
