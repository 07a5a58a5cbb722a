"""What an optimizer tells: its groups, as a table, the rates of its units, and where a loop changed the groups' rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerwise.common.layer_rate import LayerRate
from layerwise.common.parameter_names import first_few
from layerwise.errors import warn
from layerwise.optim.groups.options import own_keys
from layerwise.optim.updates import AdamW
from layerwise.optim.work.job import Group, State, local_state, rate


def cells(group: Group) -> dict[str, str]:
    """Its line of a table, title -> cell."""
    update, effective, scale = group["update"], f"{float(rate(group)):g}", group.get("lr_scale", 1.0)
    rule = update.rule(group)
    return {
        "role": str(group["role"]),
        "parameters": str(len(group["params"])),
        "entries": str(sum(param.numel() for param in group["params"])),
        "lr": effective if scale == 1.0 else f"{effective} = {float(group['lr']):g} * {scale:g}",
        "weight decay": f"{float(group['weight_decay']):g}",
        "update": repr(update),
        "rates": "-" if rule is None else type(rule).__name__,
        "geometry": "-" if isinstance(update, AdamW) else str(group["geometry"]),
        "kept": " ".join(f"{key}={value!r:.30}" for key, value in own_keys(group).items()),
    }


def described(groups: Sequence[Group]) -> str:
    """The options of each group that its update reads, in torch's form, and the first of its parameters."""
    lines = []
    for number, group in enumerate(groups):
        update = group["update"]
        unread = ("params", *update.unused, *(() if update.rule(group) else ("rates", "norm_group")))
        shown = {key: value for key, value in sorted(group.items()) if key not in unread}
        shown["param_names"] = first_few(group["param_names"])
        lines += [f"Parameter Group {number}", *(f"    {key}: {value}" for key, value in shown.items()), ""]
    return "\n".join(lines[:-1])


def scaled_twice(groups: Sequence[Group]) -> bool:
    """Whether the rates are multiplied by ``lr_scale`` already, by the loop or by timm's schedulers; it then warns.

    They are where rate over ``lr_scale`` is one number for all groups, as a multiple of ``initial_lr`` if there is one,
    although the scales differ.
    """
    scales, ratios = set(), []
    for group in groups:
        lr, scale = group["lr"], group.get("lr_scale", 1.0)
        base = group.get("initial_lr", 1.0)
        if group["params"] and not isinstance(lr, (Tensor, str)) and lr and scale and base:
            scales.add(scale)
            ratios.append(float(lr / base / scale))
    twice = len(scales) > 1 and max(ratios) <= min(ratios) * (1 + 1e-6)
    if twice:
        warn(
            "the groups' lr are multiplied by their lr_scale already, as timm's schedulers do, and every step multiplies "
            "them by it again: give each group lr * lr_scale as its lr, and no lr_scale"
        )
    return twice


class WrittenRates:
    """Tells of rates that a loop wrote into the groups and cannot have meant, each kind once. Tensors are not read."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._made = _rates_of(groups)  # until the first step

    def checked(self, groups: Sequence[Group]) -> WrittenRates | None:
        """Before a step; None once there is nothing left to look for."""
        done = not any("lr_scale" in group for group in groups) or scaled_twice(groups)
        now = _rates_of(groups) if len(self._made) > 1 else ()
        if len(now) == 1 and 0.0 not in now:
            rates = " and ".join(f"{lr:g}" for lr in sorted(self._made))
            warn(
                f"all groups take their first step at lr={next(iter(now)):g}, and were made with {rates}: a loop or a "
                "scheduler has written one rate into all of them. Scale each group's own rate (LambdaLR does, OneCycleLR "
                "takes a list as max_lr), or use an optimizer whose one lr is for all, such as DMuon or DualMuon"
            )
        self._made = frozenset()
        return None if done else self


def _rates_of(groups: Sequence[Group]) -> frozenset[float]:
    """The different rates of groups; of a tensor it would wait for the device."""
    return frozenset(float(g["lr"]) for g in groups if g["params"] and not isinstance(g["lr"], (Tensor, str)))


def rates_of_units(groups: Sequence[Group], states: Mapping[Tensor, State]) -> dict[str, LayerRate]:
    """Unit name -> squared norm, multiplier and effective rate, group by group, with one copy from the device."""
    rows: list[tuple[str, float, bool]] = []  # name, the group's lr, whether a rule sets its multiplier
    values: list[Tensor] = []
    for group in groups:
        lr, update = float(rate(group)), group["update"]
        rule = update.rule(group)
        for name, param in zip(group["param_names"], group["params"], strict=True):
            rows.extend((unit, lr, rule is not None) for unit in update.unit_names(group, name, param))
            if rule is not None:
                state = local_state(param, states[param])
                values.append(torch.stack([rule.squared_norm(state), state["multiplier"]]))
    known = iter(torch.cat([v.to(values[0].device) for v in values], dim=1).T.tolist() if values else [])
    rates = {}
    for name, lr, ruled in rows:
        squared_norm, multiplier = next(known) if ruled else (math.nan, 1.0)
        rates[name] = LayerRate(squared_norm, multiplier, lr * multiplier)
    return rates
