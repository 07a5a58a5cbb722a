"""The closed-form model of `tests/data/flerm_vectors.json`: numbers from the official code, rebuilt from formulas."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "flerm_vectors.json").read_text())["vectors"]


def wave(shape: tuple[int, ...], a: float, b: float, s: float) -> Tensor:
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (s * torch.sin(a * index + b)).reshape(shape)


def build() -> nn.Module:
    model = nn.Sequential()
    model.add_module("inp", nn.Linear(6, 5))
    model.add_module("act1", nn.Tanh())
    model.add_module("hid", nn.Linear(5, 5))
    model.add_module("act2", nn.Tanh())
    model.add_module("out", nn.Linear(5, 3))
    model.double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            if p.ndim == 2:
                p.copy_(wave(tuple(p.shape), 1.7 + 0.31 * k, 0.5 + k, math.sqrt(2 / p.shape[1])))
            else:
                p.copy_(wave(tuple(p.shape), 0.9 + 0.17 * k, 0.2 * k, 0.1))
    return model


def batch(t: int) -> Tensor:
    return wave((8, 6), 2.3 + 0.01 * t, 0.7 * t, 1.3)


def loss(model: nn.Module, t: int) -> Tensor:
    x = batch(t)
    target = torch.tanh(torch.stack([x.sum(1), x[:, 0], (x**2).mean(1)], 1))
    return ((model(x) - target) ** 2).mean()


def adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam([{"params": [p]} for p in model.parameters()], lr=lr)
