"""One matching: from measured rates and targets to multipliers, and what was decided for each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.function_space.measuring.estimators import TensorUpdate
from layerwise.function_space.measuring.process_group import local_part


@dataclass(frozen=True)
class Matched:
    """One parameter at one matching.

    measured: its function-space rate in the step as the optimizer took it. target: what it should be. change:
    the factor that its update and its learning rate were multiplied by (1 where `note` says why it was left
    alone).
    lr: its learning rate afterwards.
    """

    measured: float
    target: float
    change: float
    lr: float
    note: str


@dataclass(frozen=True)
class MatchReport:
    """What a matching did; `str()` is a table."""

    step: int
    rows: Mapping[str, Matched]

    @property
    def left_alone(self) -> dict[str, str]:
        """Parameters that keep their learning rate, and why."""
        return {
            name: row.note
            for name, row in self.rows.items()
            if row.note and not row.note.startswith("clamped")
        }

    def __str__(self) -> str:
        width = max([len("parameter"), *(len(name) for name in self.rows)])
        lines = [
            f"matched at step {self.step}",
            f"{'parameter':<{width}}    measured      target      change          lr",
        ]
        for name, row in self.rows.items():
            numbers = "".join(f"  {x:>10.4g}" for x in (row.measured, row.target, row.change, row.lr))
            lines.append(f"{name:<{width}}{numbers}  {row.note}".rstrip())
        return "\n".join(lines)


def noise_floor(measured: Mapping[str, float], relative: float) -> float:
    """The rate under which a value is taken for rounding noise: `relative` times the root sum of squares of
    all.
    """
    return relative * math.hypot(*(value for value in measured.values() if math.isfinite(value)))


def rounding_noise(dtypes: Iterable[torch.dtype]) -> float:
    """What is left of a rate that is truly 0 (a key bias), as a part of all rates' root sum of squares.

    Measured on attention under sign updates: up to 0.16 of float32's rounding and 0.02 of bfloat16's, whose kernels
    work in float32 inside. These are three times that.
    """
    return max(torch.finfo(dtype).eps * (0.5 if torch.finfo(dtype).bits >= 32 else 0.06) for dtype in dtypes)


def decide(
    measured: Mapping[str, float],
    targets: Mapping[str, float],
    negligible: Mapping[str, str],
    relative: float,
    max_change: float | None,
) -> dict[str, tuple[float, str]]:
    """The change of each parameter's rate, and a note where it is not simply target / measured.

    A rate of 0 or of rounding noise says nothing about the step that is right: such a parameter keeps its
    rate (`negligible` says so for other reasons).
    """
    floor = noise_floor(measured, relative)
    decided = {}
    for name, value in measured.items():
        change, note = 1.0, negligible.get(name, "")
        if note:
            pass
        elif not math.isfinite(value):
            note = "kept: its measured rate is not finite"
        elif value == 0:
            note = "kept: its update does not reach the outputs"
        elif value <= floor:
            note = f"kept: its measured rate is rounding noise (below {floor:.2g})"
        else:
            change = targets[name] / value
            if max_change is not None and not 1 / max_change <= change <= max_change:
                clamped = min(max(change, 1 / max_change), max_change)
                note, change = f"clamped from {change:.3g}", clamped
        decided[name] = (change, note)
    return decided


@torch.no_grad()
def rescale(param: Tensor, update: TensorUpdate, change: float) -> None:
    """Redo a step at `change` times its rate: `W = old - pull * old + change * dW`, piece by piece, in place.

    A step is proportional to its rate, so nothing of the optimizer is run again, and its state, which does
    not depend on the rate, stays as it is.
    """
    if change == 1.0 or update.old is None:
        return
    param, update = local_part(param.detach()), update.block()
    assert update.old is not None
    target = param.reshape(1) if param.ndim == 0 else param
    old = update.old.reshape(1) if update.old.ndim == 0 else update.old
    for start, stop in update.pieces():
        before = old[start:stop].to(update.dtype) * (1.0 - update.pull)
        target[start:stop].copy_(before.add_(update.rows(start, stop), alpha=change))
