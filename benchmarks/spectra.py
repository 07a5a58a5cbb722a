"""Singular values of every kind that an estimate of a nuclear norm must get right: for `noise_estimates.py` and tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

#: Written by `noise_estimates.py --record`: width, then "matrix, step", then singular values of its gradient difference.
RECORDED = Path(__file__).parents[1] / "tests" / "data" / "gradient_differences.json"


def closed_forms(n: int) -> dict[str, Tensor]:
    """Name to `[n]` singular values in float64: power laws, geometric, log-spaced, low rank with tails, white noise."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    found = {f"i^-{a}": i**-a for a in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)}
    found |= {f"{q}^i": q**i for q in (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)}
    found |= {f"{d} decades": log_spaced(n, d) for d in (1, 2, 3, 4, 6, 8)}
    for rank in (1, 4, 8, 16, 32):
        for tail in (0.3, 0.1, 0.03, 0.01, 0.001):
            found[f"rank {rank}, tail {tail}"] = with_rank(torch.full_like(i, tail), rank)
        found[f"rank {rank}, tail 0.1 i^-0.5"] = with_rank(0.1 * i**-0.5, rank)
        found[f"rank {rank}, tail of 3 decades"] = with_rank(0.3 * log_spaced(n, 3), rank)
    found["rank 16, all equal, tail of 3 decades"] = found["rank 16, tail of 3 decades"].clamp(max=1)
    generator = torch.Generator().manual_seed(0)
    for ratio in (1, 4):
        noise = torch.randn(n, ratio * n, generator=generator, dtype=torch.float64)
        found[f"white noise, n x {ratio} n"] = torch.linalg.svdvals(noise)
    spiked = found["white noise, n x 1 n"].clone()
    spiked[:4] *= torch.tensor([30.0, 10.0, 5.0, 2.0])
    return found | {"white noise and four more": spiked}


def log_spaced(n: int, decades: float) -> Tensor:
    return 10 ** (-decades * torch.arange(n, dtype=torch.float64) / (n - 1))


def with_rank(tail: Tensor, rank: int) -> Tensor:
    """The first values of a tail lifted to between 1 and 1.2."""
    values = tail.clone()
    values[:rank] = torch.linspace(1.2, 1, rank, dtype=tail.dtype)
    return values


def recorded(width: int) -> dict[str, Tensor]:
    """Those of a GPT-2's gradient differences at its first steps, its 100th and its 1000th."""
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in _record()[str(width)].items()}


def recorded_widths() -> list[int]:
    return [int(width) for width in _record()]


def _record() -> dict[str, dict[str, list[float]]]:
    return json.loads(RECORDED.read_text())


def with_values(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """`[k, *shape]` in float32 with singular values `[k, min(shape)]`, all in the same random directions."""
    generator = torch.Generator().manual_seed(1)
    n = min(shape)
    left, _ = torch.linalg.qr(torch.randn(shape[0], n, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], n, generator=generator, dtype=torch.float64))
    return torch.stack([((left * row) @ right.T).float() for row in values])
