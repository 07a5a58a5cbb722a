"""Static factors on the learning rates of roles: what muP prescribes for Adam is `{hidden: 1/w, head: 1/w}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from layerwise.errors import LayerwiseError
from layerwise.geometry import describe
from layerwise.lab.config.validate import nearest


def scale_roles(
    model: nn.Module, groups: Iterable[dict[str, Any]], lr: float, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The groups of named parameters, cut so that every role in `factors` has groups of its own at `lr * factor`.

    Raises LayerwiseError for a role that the model has no parameter of.
    """
    groups = list(groups)
    if not factors:
        return groups
    roles = {row.name: row.role for row in describe(model).rows}
    for role in factors:
        if role not in roles.values():
            raise LayerwiseError(f"optimizer.role_factors: {role!r}: {nearest(role, set(roles.values()))}")
    cut: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[float, list[Any]] = {}
        for name, parameter in group["params"]:
            parts.setdefault(factors.get(roles[name], 1.0), []).append((name, parameter))
        cut += [
            {**group, "params": params} | ({} if factor == 1.0 else {"lr": lr * factor})
            for factor, params in parts.items()
        ]
    return cut
