"""Learning-rate schedules: the factor on the base rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from layerwise.lab.config.schema import ScheduleConfig


def schedule_factor(config: ScheduleConfig, steps: int) -> Callable[[int], float]:
    """The factor at step 0, 1, ..., steps - 1.

    Warm-up rises linearly and reaches 1 after `config.warmup(steps)` steps; then constant stays at 1, cosine and
    linear go down to `final_fraction`, reached at the last step; wsd stays at 1 and goes down linearly over
    the last `decay_fraction` of all steps.
    """
    warmup, final = config.warmup(steps), config.final_fraction

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        start = max(warmup, round(steps * (1 - config.decay_fraction))) if config.name == "wsd" else warmup
        done = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
        if config.name == "constant":
            return 1.0
        if config.name == "cosine":
            return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
        return final + (1 - final) * (1 - done)

    return factor
