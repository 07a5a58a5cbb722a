"""No non-finite gradient reaches the weights in silence, and finding one never waits for the device.

On a CPU the gradients are looked at before anything else happens. On a GPU looking would stall the queue, so the step
is made harmless on the device itself: every update is selected by a bool tensor ``keep``. With ``nonfinite="raise"`` the
finding is copied to the host in the background and raised by the first later step that finds it there; no step in
between has used a non-finite number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from layerwise.common.parameter_names import first_few
from layerwise.errors import LayerwiseError, NonFiniteError

POLICIES: Final = ("raise", "skip")
#: Devices that run ahead of the host and can say, without being waited for, that a copy has arrived.
WITH_EVENTS: Final = ("cuda",)


class OnHost(NamedTuple):
    """Numbers of a device on their way to the host, which does not wait for them."""

    values: Tensor
    arrival: torch.cuda.Event

    @classmethod
    def of(cls, tensor: Tensor) -> OnHost:
        """A copy that is filled in the background."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record()
        return cls(host, arrival)

    @property
    def arrived(self) -> bool:
        """Whether the values may be read."""
        return bool(self.arrival.query())


class _Finding(NamedTuple):
    names: tuple[str, ...]
    bad: OnHost


class NonFiniteGuard:
    """Looks for NaN and inf in gradients; ``policy`` is ``"raise"`` or ``"skip"`` (and count)."""

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES:
            raise LayerwiseError(f"nonfinite={policy!r}: give one of {', '.join(map(repr, POLICIES))}")
        self.policy = policy
        self._skipped: int | Tensor = 0
        self._findings: list[_Finding] = []

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far (reading it waits for the device)."""
        return int(self._skipped)

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self._skipped = value

    def __getstate__(self) -> dict[str, object]:
        return {"policy": self.policy, "_skipped": self.skipped_steps, "_findings": []}

    def check(
        self,
        names: Sequence[str],
        gradients: Sequence[Tensor],
        anywhere: Callable[[Tensor], Tensor] | None = None,
        together: Sequence[Tensor] = (),
    ) -> Tensor | bool:
        """Look at gradients.

        Args:
            names: of the parameters.
            gradients: theirs.
            anywhere: makes flags true that are true on any process, so that all of them decide alike; None: there is one.
            together: tensors that hold all gradients, several in one, which are quicker to look at.

        Returns:
            True: go on. False: skip this step. A 0-dim bool tensor: go on, with every update selected by it.
        """
        if self._findings:
            self._raise_arrived()
        if not gradients:
            return True
        if gradients[0].device.type == "cpu" and "cpu" not in WITH_EVENTS:
            # Squares may leave the range of numbers, but a 2-norm takes a twentieth of the time of one of order infinity.
            norms = torch._foreach_norm(list(together or gradients), 2.0)
            bad = ~torch.stack([norm if norm.is_cpu else norm.cpu() for norm in norms]).isfinite().all(0, keepdim=True)
            if not bool(bad if anywhere is None else anywhere(bad)):
                return True
        bad = _not_finite(gradients)
        bad = bad if anywhere is None else anywhere(bad)
        if bad.device.type in WITH_EVENTS:
            return self._check_later(tuple(names), bad)
        if not bool(bad.any()):
            return True
        if self.policy == "raise":
            raise _error(names, bad)
        self._skipped += 1
        return False

    def _check_later(self, names: tuple[str, ...], bad: Tensor) -> Tensor:
        """Without waiting for the device."""
        any_bad = bad.any()
        if self.policy == "skip":
            self._skipped = any_bad.int() + self._skipped
        else:
            self._findings.append(_Finding(names, OnHost.of(bad)))
        return ~any_bad

    def _raise_arrived(self) -> None:
        while self._findings and self._findings[0].bad.arrived:
            names, bad = self._findings.pop(0)
            if bool(bad.values.any()):
                self._findings.clear()
                raise _error(names, bad.values)


def _not_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Which hold an entry that is no finite number, on the device of the first.

    The largest entry is non-finite exactly when an entry is, and never by overflow.
    """
    filled = [g if g.numel() else g.new_zeros(1) for g in gradients]  # this process may hold no part of one
    norms, device = torch._foreach_norm(filled, math.inf), gradients[0].device
    return ~torch.stack([norm if norm.device == device else norm.to(device) for norm in norms]).isfinite()


def _error(names: Sequence[str], bad: Tensor) -> NonFiniteError:
    culprits = [name for name, is_bad in zip(names, bad.tolist(), strict=True) if is_bad]
    return NonFiniteError(
        f"non-finite gradient in {first_few(map(repr, culprits))}; the weights were not touched. "
        "Lower the learning rate, clip or scale the loss, or pass nonfinite='skip' to skip and count such steps"
    )
