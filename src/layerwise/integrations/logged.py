"""Layer rates as the flat numbers that trainers log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any, Final, Literal, get_args

from layerwise.common.checked import checked
from layerwise.common.layer_rate import LayerRate, parameter_of
from layerwise.common.parameter_names import canonical_name
from layerwise.errors import LayerwiseError, warn
from layerwise.function_space.watching.watch_record import unit_rates, unit_scalars
from layerwise.optim.optimizer import layerwise_optimizer

#: What the numbers are means over, the finest first.
Level = Literal["unit", "role and block", "block", "role"]
#: How many names one step logs at most, each with a rate and, where it is measured, a squared norm.
MOST_NAMES: Final = 512


@checked
@dataclass
class RateLog:
    """What is logged of an optimizer's layer rates: means over units, of at most 512 names a step.

    Args:
        by: one number for each `"unit"`, for the units of one `"role"` or one `"block"` (`model.layers.3`), or, `"role and
            block"`, of one role in one block. Where that is more than 512 names, the next coarser is taken, and said once.
        only: glob patterns of units or parameters; the others are left out.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> RateLog(by="role")(lw.DMuon(lw.param_groups(model), lr=0.5))
        {'layer_lr/hidden': 0.5, 'layer_lr/vector': 0.5, 'layer_lr/head': 0.5}
    """

    by: Level = "role and block"
    only: str | Sequence[str] = "*"
    _said: bool = field(default=False, repr=False)  # that there are too many

    def __call__(self, optimizer: Any) -> dict[str, float]:
        """``{"layer_lr/NAME": rate, "layer_squared_norm/NAME": ...}``; no norm where none is measured."""
        inner = layerwise_optimizer(optimizer)
        patterns = [self.only] if isinstance(self.only, str) else self.only
        units = {unit: rate for unit, rate in unit_rates(inner).items() if _wanted(unit, patterns)}
        if not units:
            raise LayerwiseError(f"only={self.only!r} matches no unit, such as {next(iter(inner.layer_rates()), '')!r}")
        roles = {name: str(g["role"]) for g in inner.param_groups for name in g["param_names"]}
        grouped = _grouped(units, roles, self.by)
        if len(grouped) > MOST_NAMES:
            self._say(len(grouped))
            levels = get_args(Level)
            coarser = levels[levels.index(self.by) + 1 :]
            every = (_grouped(units, roles, level) for level in coarser)
            grouped = next(found for found in every if len(found) <= MOST_NAMES)
        return unit_scalars({name: _mean(rates) for name, rates in grouped.items()})

    def _say(self, count: int) -> None:
        if not self._said:
            self._said = True
            warn(
                f"layer rates by {self.by} are {count} names a step, and {MOST_NAMES} are logged at most: coarser ones "
                "are logged; choose some with only=, or by='role'"
            )


def _wanted(unit: str, patterns: Sequence[str]) -> bool:
    return any(unit == pattern or fnmatchcase(parameter_of(unit), pattern) for pattern in patterns)


def _grouped(units: dict[str, LayerRate], roles: dict[str, str], by: str) -> dict[str, list[LayerRate]]:
    found: dict[str, list[LayerRate]] = {}
    for unit, rate in units.items():
        parameter = parameter_of(unit)
        role, block = roles[parameter], block_of(parameter)
        name = {
            "unit": unit,
            "role": role,
            "block": block or "outside",
            "role and block": f"{block}/{role}" if block else role,
        }[by]
        found.setdefault(name, []).append(rate)
    return found


def block_of(parameter: str) -> str:
    """The block that a parameter lies in: its name up to the first number, "" outside of all."""
    steps = canonical_name(parameter).split(".")
    first = next((i for i, step in enumerate(steps) if step.isdigit()), None)
    return "" if first is None else ".".join(steps[: first + 1])


def _mean(rates: Sequence[LayerRate]) -> LayerRate:
    """The mean of each number; of the squared norm over the units that have one."""
    norms = [rate.squared_norm for rate in rates if not math.isnan(rate.squared_norm)]
    squared_norm = fmean(norms) if norms else math.nan
    return LayerRate(squared_norm, fmean(rate.multiplier for rate in rates), fmean(rate.lr for rate in rates))
