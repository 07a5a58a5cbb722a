"""Small models and data that the tests of matching share."""

import torch
from torch import nn


class ResNet(nn.Module):
    """`x + W relu(x)` blocks, as the paper's ResMLP."""

    def __init__(self, width: int, depth: int, seed: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.inp = nn.Linear(12, width, dtype=dtype)
        self.blocks = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(depth))
        self.out = nn.Linear(width, 5, dtype=dtype)

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x.relu()) / len(self.blocks) ** 0.5
        return self.out(x)


def batch(seed: int, dtype: torch.dtype = torch.float32):
    """Inputs and labels for the gradient, and other inputs to measure on."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 12, generator=generator).to(dtype)
    return x, x[:, :5].abs().argmax(1), torch.randn(32, 12, generator=generator).to(dtype)


def backward(model, seed: int) -> float:
    x, y, _ = batch(seed, next(model.parameters()).dtype)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.item()


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
