"""The official procedure of FLeRM, literally, from its formulas (arXiv 2502.17405): what the flaw tests fail on.

Also what `benchmarks/function_space.py` compares with. One optimizer group per parameter, in the order of the names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NaiveFLeRM:
    """Rates by the group's position, an EMA over calls, forwards in training mode, `.grad` as working memory."""

    def __init__(self, model: nn.Module, optimizer, base: list[float], outer_lr: float, *, method="kronecker", beta=0.9):
        self.model, self.optimizer, self.base, self.outer_lr = model, optimizer, base, outer_lr
        self.method, self.beta = method, beta
        self.params = dict(model.named_parameters())
        self.saved = {n: p.detach().clone() for n, p in self.params.items()}  # kept for ever
        self.ema: dict[str, list[Tensor]] = {}
        self.calls = 0
        self.delta: dict[str, float] = {}

    def save_weights(self) -> None:
        for name, p in self.params.items():
            self.saved[name].copy_(p.detach())

    def swap(self) -> None:
        for name, p in self.params.items():
            p.data, self.saved[name] = self.saved[name], p.data

    def call(self, inputs: Tensor, modify: bool, eps: Tensor | None = None) -> None:
        """One probe on a fresh batch at the old weights; new rates if `modify`."""
        self.swap()
        self.model.zero_grad()
        outputs = self.model(inputs)
        eps = torch.randn_like(outputs) if eps is None else eps
        phi = (eps * outputs).sum() / outputs.numel() ** 0.5
        phi.backward()
        self.calls += 1
        for (name, p), group in zip(self.params.items(), self.optimizer.param_groups, strict=True):
            z = (self.saved[name] - p.detach()) * p.grad
            self.delta[name] = (self.estimate(name, z).sqrt() / torch.tensor(group["lr"])).item()
        self.swap()
        if modify:
            for name, group, base in zip(self.params, self.optimizer.param_groups, self.base, strict=True):
                group["lr"] = (self.outer_lr * base / torch.tensor(self.delta[name])).item()

    def estimate(self, name: str, z: Tensor) -> Tensor:
        if self.method == "iid":
            moments = [z.square().sum()]
        elif self.method == "full_cov" or z.ndim < 2:
            moments = [z.sum().square()]
        else:
            moments = [z.square().sum()] + [z.sum(d).square().sum() for d in range(z.ndim)]
        old = self.ema.get(name, [torch.zeros_like(m) for m in moments])
        self.ema[name] = [self.beta * o + (1 - self.beta) * m for o, m in zip(old, moments, strict=True)]
        mean = [m / (1 - self.beta**self.calls) for m in self.ema[name]]
        if len(mean) == 1:
            return mean[0]
        return torch.stack(mean[1:]).prod() / mean[0] ** (z.ndim - 1)
