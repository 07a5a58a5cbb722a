"""From sums over tensors to what a step did to each module."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from layerwise.function_space.steps.update_sums import TensorSums

#: What parameters of the model itself, in no module of it, are listed under.
ROOT = "(model)"


def module_of(parameter: str) -> str:
    """The module that a parameter belongs to; of a parametrised weight, the layer and not its parametrization.

    Examples:
        `module_of("h.0.mlp.c_fc.weight") == "h.0.mlp.c_fc"`
    """
    return parameter.rpartition(".")[0].partition("parametrizations.")[0].rstrip(".") or ROOT


def siblings_of(module: str) -> str:
    """The pattern that a module shares with those in its place in other blocks.

    Examples:
        `siblings_of("h.3.mlp.c_fc") == "h.*.mlp.c_fc"`
    """
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)


def by_module(parameters: Iterable[str]) -> dict[str, list[str]]:
    """The parameters of each module, in order."""
    found: dict[str, list[str]] = {}
    for name in parameters:
        found.setdefault(module_of(name), []).append(name)
    return found


@dataclass(frozen=True)
class ModuleUpdate:
    """One step of one module: over all entries of its own parameters.

    Attributes:
        weight_rms: of the weights before the step.
        update_rms: of the update.
        ratio: norm of the update over that of the weights; inf where the weights are 0.
        spectral: spectral norm of the update, from below; the largest of the module's matrices; None without one.
        gradient_rms: None where there is no gradient.
        noise_to_signal: of the gradient, from its difference to the step before: `|g - g'| / sqrt(2 <g, g'>)`, where two
            independent gradients have `E |g - g'|^2 / 2` = noise and `E <g, g'>` = signal; inf where they do not agree at
            all; None without an earlier gradient.
        loss_change: what the step changes the loss of its own batch by, to first order: `<g, dW>`.
    """

    weight_rms: float
    update_rms: float
    ratio: float
    spectral: float | None
    gradient_rms: float | None = None
    noise_to_signal: float | None = None
    loss_change: float | None = None


def module_updates(sums: Mapping[str, TensorSums]) -> dict[str, ModuleUpdate]:
    """What the step did to each module."""
    return {module: _together([sums[name] for name in names]) for module, names in by_module(sums).items()}


def _together(sums: list[TensorSums]) -> ModuleUpdate:
    entries = max(1, sum(s.entries for s in sums))
    weight, update = sum(s.weight_square for s in sums), sum(s.update_square for s in sums)
    norms = [s.matrix_norm for s in sums if s.matrix_norm is not None]
    gradients = [(s.gradient_square, s.entries) for s in sums if s.gradient_square is not None]
    changes = [s.gradient_update for s in sums if s.gradient_update is not None]
    return ModuleUpdate(
        weight_rms=math.sqrt(weight / entries),
        update_rms=math.sqrt(update / entries),
        ratio=math.sqrt(update / weight) if weight else (math.inf if update else 0.0),
        spectral=max(norms) if norms else None,
        gradient_rms=_rms(gradients) if gradients else None,
        noise_to_signal=_noise_to_signal(sums),
        loss_change=sum(changes) if changes else None,
    )


def _rms(squares: list[tuple[float, int]]) -> float:
    """Of entries given as sums of squares and counts."""
    return math.sqrt(sum(square for square, _ in squares) / max(1, sum(count for _, count in squares)))


def _noise_to_signal(sums: list[TensorSums]) -> float | None:
    noises = [s.difference_square for s in sums if s.difference_square is not None]
    signal = sum(s.gradient_earlier for s in sums if s.gradient_earlier is not None)
    if not noises:
        return None
    return math.sqrt(sum(noises) / 2 / signal) if signal > 0 else math.inf
