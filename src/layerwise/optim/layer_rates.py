"""What an optimizer tells about the rates of its units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerwise.common.layer_rate import LayerRate
from layerwise.optim.work.job import Group, State, local_state, rate


def layer_rates(groups: Sequence[Group], states: Mapping[Tensor, State]) -> dict[str, LayerRate]:
    """Unit name -> noise, multiplier and effective rate, with one copy from the device."""
    rows: list[tuple[str, float, bool]] = []  # name, the group's lr, whether a rule sets its multiplier
    values: list[Tensor] = []
    for group in groups:
        lr, update = float(rate(group)), group["update"]
        rule = update.rule(group)
        for name, param in zip(group["param_names"], group["params"], strict=True):
            rows.extend((unit, lr, rule is not None) for unit in update.unit_names(group, name, param))
            if rule is not None:
                state = local_state(param, states[param])
                values.append(torch.stack([rule.noise(state), state["multiplier"]]))
    known = iter(torch.cat([v.to(values[0].device) for v in values], dim=1).T.tolist() if values else [])
    rates = {}
    for name, lr, ruled in rows:
        noise, multiplier = next(known) if ruled else (math.nan, 1.0)
        rates[name] = LayerRate(noise, multiplier, lr * multiplier)
    return rates
