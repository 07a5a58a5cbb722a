"""Muon and Scion as their authors wrote them down, in float32: the contenders that `optimizer_step.py` must beat.

The published codes cast to bfloat16 first; on a CPU without bfloat16 units that makes them 28 to 49 times slower, so
the cast is left out here and nothing else is changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315


def jordan_newton_schulz(g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Jordan 2024 (also Scion's): three products and three sums a step."""
    x = g.to(dtype)
    if g.size(0) > g.size(1):
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.T if g.size(0) > g.size(1) else x


def torch_newton_schulz(g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `torch.optim.Muon` does it: the sums folded into the products."""
    x = g.to(dtype, copy=True)
    if g.size(0) > g.size(1):
        x = x.T
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if g.size(0) > g.size(1) else x


class LiteralMuon:
    """Jordan's Muon on a list of matrices."""

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ):
        self.params, self.lr, self.momentum, self.dtype = list(params), lr, momentum, dtype
        self.buffers = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self) -> None:
        for p, buffer in zip(self.params, self.buffers, strict=True):
            buffer.lerp_(p.grad, 1 - self.momentum)
            update = jordan_newton_schulz(p.grad.lerp(buffer, self.momentum), self.dtype)
            p.add_(update.to(p.dtype), alpha=-self.lr * max(1, p.size(0) / p.size(1)) ** 0.5)


class LiteralScion:
    """Scion (arXiv 2502.07529) with its spectral norm on every matrix."""

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float = 2**-12,
        momentum: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ):
        self.params, self.lr, self.momentum, self.dtype = list(params), lr, momentum, dtype
        self.buffers = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self) -> None:
        for p, buffer in zip(self.params, self.buffers, strict=True):
            buffer.mul_(1 - self.momentum).add_(p.grad, alpha=self.momentum)
            update = jordan_newton_schulz(buffer, self.dtype)
            p.add_(update.to(p.dtype), alpha=-self.lr * 50 * (p.size(0) / p.size(1)) ** 0.5)
