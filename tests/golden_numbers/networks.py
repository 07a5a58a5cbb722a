"""Networks with a parameter of every kind, and batches: the same bits wherever torch's own generator gives the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import layerwise as lw

VOCABULARY, WIDTH, BATCH = 13, 8, 12


class Zoo(nn.Module):
    """Embedding, fused projection, convolution, stack of experts, tall and wide matrices, vectors, a scalar, head."""

    def __init__(self, scale: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.experts = nn.Parameter(torch.empty(4, 10, WIDTH))
        self.up = nn.Linear(WIDTH, 70)
        self.square = nn.Linear(70, 66, bias=False)  # large enough that its nuclear norm is estimated
        self.norm = nn.LayerNorm(66)
        self.scale = nn.Parameter(torch.ones(scale))
        self.head = nn.Linear(66, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + torch.tanh(q) * torch.tanh(k) + v
        x = x + self.conv(x.mT).mT
        gate, up = torch.einsum("koi,bti->btko", self.experts, x).chunk(2, dim=-1)
        x = x + pad((torch.tanh(gate) * up).sum(2), (0, WIDTH - 5))
        return self.head(self.norm(self.square(torch.tanh(self.up(x)))) * self.scale)


class Residual(nn.Module):
    """`x + W relu(x)` blocks, for the depth maps of FLeRM."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.inp = nn.Linear(6, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.out = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x.relu()) / len(self.blocks) ** 0.5
        return self.out(x)


def drawn(model: nn.Module, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The model with weights of about unit gain, drawn in float64 whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    model.to(dtype)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data.copy_(noise / p.shape[-1] ** 0.5 if p.ndim > 1 else 1.0 + 0.1 * noise)
    return model


def zoo(dtype: torch.dtype) -> nn.Module:
    return drawn(Zoo(), dtype)


def zoo_groups(model: nn.Module, **overrides: Any) -> list[dict[str, Any]]:
    experts = {"experts": {"role": "experts", "layout": lw.StackLayout(lw.Split.equal("gate", "up"))}}
    return lw.param_groups(model, overrides=experts | overrides, splits={"qkv.*": 3})


def tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(VOCABULARY, (BATCH, 6), generator=generator)


def zoo_backward(model: nn.Module, given: Tensor, parts: int = 1) -> None:
    loss = cross_entropy(model(given).flatten(0, 1), given.roll(1, 1).flatten())
    (loss / parts).backward()


def features(seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(200 + seed)
    return torch.randn(16, 6, generator=generator, dtype=torch.float64).to(dtype)


def residual_backward(model: nn.Module, seed: int) -> None:
    x = features(seed, next(model.parameters()).dtype)
    cross_entropy(model(x), x[:, :5].abs().argmax(1)).backward()
