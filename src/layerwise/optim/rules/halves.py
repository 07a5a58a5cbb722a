"""The two halves of an accumulated batch, for ``NoiseAdaptive(reference="independent")``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from layerwise.common.tensors import local_part
from layerwise.errors import LayerwiseError


class Halves:
    """What ``.grad`` held after each half. A buffer goes from A (after the first) to 2 A - B (B: after both)."""

    def __init__(self) -> None:
        self.held = 0

    @torch.no_grad()
    def hold(self, params: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Note one more half, for ``(parameter, its buffer)``. After both the next call begins another batch."""
        self.held = self.held % 2 + 1
        buffers, grads = [], []
        for param, buffer in params:
            buffers.append(buffer)
            grads.append(torch.zeros_like(buffer) if param.grad is None else local_part(param.grad))
        if buffers and self.held == 1:
            torch._foreach_copy_(buffers, grads)
        elif buffers:
            torch._foreach_mul_(buffers, 2.0)
            torch._foreach_sub_(buffers, grads)

    def close(self, params: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Before the step: the second half is what ``.grad`` holds now, unless it was noted already."""
        if self.held == 0:
            raise LayerwiseError(
                "noise reference 'independent' compares two halves of the accumulated batch: call optimizer.hold_half() "
                "after the first half's backward(), or use reference='previous'"
            )
        if self.held == 1:
            self.hold(params)

    def forget(self) -> None:
        """The batch is over: its gradients were used or cleared."""
        self.held = 0
