"""The gradients of the step that is recorded, and of the one before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Gradients:
    """Holds gradients around steps: references, and a copy of those that have to last until the next step.

    Most optimizers leave `.grad` as it is. One that writes into it (to add decay, to centre it) is found out at the first
    record, which then has no gradients, and gets a copy taken before its steps from then on.

    Attributes:
        now: of the present step, by name, as it took them; unscaled where a fused optimizer unscales them itself.
        earlier: of the step before; empty where they were not kept.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.now: dict[str, Tensor] = {}
        self.earlier: dict[str, Tensor] = {}
        self._writes = False
        self._versions: dict[str, int] = {}
        self._parameters: Mapping[str, nn.Parameter] = {}

    def before(self, closure: bool, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the gradients before the step, unless it makes them itself, in a closure."""
        self.now, self._versions, self._parameters = {}, {}, parameters
        if not closure:
            self.now = self._read()
            if self._writes:
                self.now = {name: g.clone() for name, g in self.now.items()}
            self._versions = {name: g._version for name, g in self.now.items()}

    def after(self) -> None:
        """Take the closure's gradients after the step, or see whether the others still stand."""
        if not self._versions:
            self.now = self._read()
        elif any(self.now[name]._version != version for name, version in self._versions.items()):
            self._writes, self.now = True, {}

    def next(self, keep: bool) -> None:
        """The step is over; `keep`: the next one is compared with it."""
        # A loop may clear its gradients in place, or go on adding to them.
        self.earlier = {name: g.clone() for name, g in self.now.items()} if keep else {}
        self.now, self._versions, self._parameters = {}, {}, {}

    def _read(self) -> dict[str, Tensor]:
        found = {name: p.grad.detach() for name, p in self._parameters.items() if p.grad is not None}
        scale = getattr(self.optimizer, "grad_scale", None)
        if isinstance(scale, Tensor):  # of a GradScaler, where a fused optimizer divides by it in its step
            found = {name: g / scale.to(g.device, torch.float32) for name, g in found.items()}
        return found
