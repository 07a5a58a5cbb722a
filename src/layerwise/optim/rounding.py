"""Steps in half precision: decay and step rounded once, stochastic rounding, and steps that are below the spacing.

A bfloat16 number has a spacing of 2^-7 of its power of two. ``W - lr * weight_decay * W`` with ``lr * weight_decay`` below
2^-9 rounds back to W, and so does a step below half of W's spacing; rounded to nearest, such weights never move.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from layerwise.errors import warn
from layerwise.optim.guard import WITH_EVENTS, OnHost
from layerwise.optim.work.job import Group, Job, select

ROUNDINGS: Final = ("nearest", "stochastic")
HALF: Final = (torch.bfloat16, torch.float16)
#: Entries of each parameter that are looked at, and the steps at which they are: a warm-up's first steps are tiny.
_SAMPLE: Final = 1024
_LOOKS: Final = (10, 100, 1000)


def is_stochastic(group: Group, param: Tensor) -> bool:
    """Whether steps of this parameter are rounded up or down at random: only bfloat16 ever is."""
    return group.get("rounding") == "stochastic" and param.dtype == torch.bfloat16


def move_once_rounded(job: Job, direction: Tensor, keep: Tensor | None) -> None:
    """``W <- round(W - lr * (weight_decay * W + direction))``, in place, for a parameter in half precision."""
    param, lr, decay = job.local, job.lr, job.group["weight_decay"]
    alike = param.dtype == direction.dtype == torch.bfloat16  # not where a model was cast under its optimizer
    if alike and not isinstance(lr, Tensor) and not is_stochastic(job.group, param):
        # lerp computes in float32: W + lr decay (-direction / decay - W)
        moved = param.lerp(direction.mul(-1.0 / decay), lr * decay)
        param.copy_(select(keep, moved, param))  # a lerp from -0.0 to itself is +0.0: no bit may change
        return
    if isinstance(lr, Tensor):
        lr = lr.reshape(())
    wide = param.float()
    wide = wide - lr * (decay * wide + direction)
    store(job, select(keep, wide, param.float()))


def store(job: Job, wide: Tensor) -> None:
    """Put float32 numbers into a parameter of half precision, by the rounding of its group."""
    if is_stochastic(job.group, job.local):
        # Of one parameter at one step, the same on every process and after a resume. A CPU's generator takes 32 bits.
        seed = zlib.crc32(f"{job.group['rounding_seed']} {job.name}".encode())
        wide = stochastically(wide, seed)
    job.local.copy_(wide)


def stochastically(wide: Tensor, seed: int) -> Tensor:
    """float32 to numbers that bfloat16 holds: up or down, so that the mean is the number itself.

    The 16 bits that bfloat16 drops, and a whole random number of 16 bits, carry into those that stay.
    """
    generator = torch.Generator(wide.device).manual_seed(seed)
    noise = torch.randint(0, 2**16, wide.shape, generator=generator, device=wide.device, dtype=torch.int32)
    bits = (wide.contiguous().view(torch.int32) + noise) & -(2**16)
    return torch.where(wide.isfinite(), bits.view(torch.float32), wide)


class Vanishing:
    """Warns once where most entries of weights in half precision do not move, by a sample at a few steps."""

    def __init__(self) -> None:
        self._steps = 0
        self._told = False
        self._finding: OnHost | None = None  # entries that should have moved and did not, and all that should have

    def before(self, moving: Sequence[Job]) -> list[tuple[Job, Tensor]]:
        """A sample of every parameter that may be too coarse for its steps, at the steps that are looked at."""
        self._steps += 1
        if self._told or (self._finding is None and self._steps not in _LOOKS):
            return []
        if self._finding is not None and self._finding.arrived:  # on the host, which did not wait for it
            found, self._finding = self._finding.values, None
            self._tell(found)
        coarse = [job for job in moving if job.local.dtype in HALF and not is_stochastic(job.group, job.local)]
        return [(job, _sample(job.local).clone()) for job in coarse] if self._steps in _LOOKS else []

    def after(self, before: Sequence[tuple[Job, Tensor]], groups: Sequence[Group]) -> None:
        """Compare with what the samples have become; and another seed for the next step, saved with a group's options."""
        for group in groups:
            if "rounding_seed" in group:
                group["rounding_seed"] += 1
        if not before:
            return
        counts = []
        for job, old in before:
            decayed = bool(job.group["weight_decay"])
            due = (_sample(job.grad) != 0) | ((old != 0) & decayed)
            counts.append(torch.stack([(due & (_sample(job.local) == old)).sum(), due.sum()]))
        total = torch.stack([count.to(counts[0].device) for count in counts]).sum(0)
        if total.device.type in WITH_EVENTS:
            self._finding = OnHost.of(total)
        else:
            self._tell(total)

    def _tell(self, counts: Tensor) -> None:
        still, due = counts.tolist()
        if due and still > due / 2:
            self._told = True
            warn(
                f"{100 * still / due:.0f} % of the weights in half precision that a step should have moved stayed as they "
                "were: the step, or lr * weight_decay, is below their spacing. Give rounding='stochastic' (bfloat16), keep "
                "the weights in float32 (torch.autocast computes in bfloat16), or take a larger rate"
            )


def _sample(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)[:_SAMPLE] if tensor.is_contiguous() else tensor.flatten()[:_SAMPLE]
