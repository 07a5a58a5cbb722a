"""Hypothesis strategies: stacks of matrices of every kind that a gradient can be."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
KINDS = ("gaussian", "rank_one", "low_rank", "steep", "sparse", "zero")
SCALES = (1.0, 2.0**-7, 1e-30, 1e-38, 1e30, 1e34)  # at 1e36 the dual norms themselves leave float32
SHAPES = ((6, 6), (3, 11), (11, 3), (1, 9), (9, 1), (1, 1), (40, 12), (12, 40), (2, 5, 5), (2, 3, 4, 7))


def make(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A float64 stack with entries of order one."""
    generator = torch.Generator().manual_seed(seed)
    *batch, n, m = shape

    def gaussian(*size: int) -> Tensor:
        return torch.randn(*batch, *size, generator=generator, dtype=torch.float64)

    if kind == "zero":
        return torch.zeros(*batch, n, m, dtype=torch.float64)
    if kind == "rank_one":
        return gaussian(n, 1) @ gaussian(1, m)
    if kind == "low_rank":
        rank = max(1, min(n, m) // 2)
        return gaussian(n, rank) @ gaussian(rank, m)
    if kind == "steep":  # singular values 1, 1/4, 1/9, ...
        u, _, vh = torch.linalg.svd(gaussian(n, m), full_matrices=False)
        return (u * torch.arange(1, min(n, m) + 1, dtype=torch.float64) ** -2.0) @ vh
    dense = gaussian(n, m)
    return dense * (gaussian(n, m) > 1) if kind == "sparse" else dense


@st.composite
def stacks(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, scales: tuple[float, ...] = SCALES) -> Tensor:
    matrices = make(draw(st.sampled_from(KINDS)), draw(st.sampled_from(SHAPES)), draw(st.integers(0, 2**31)))
    return (matrices * draw(st.sampled_from(scales))).to(draw(st.sampled_from(dtypes)))


def rounding(x: Tensor) -> float:
    """Relative rounding of the dtype a stack is kept in."""
    return torch.finfo(x.dtype).eps
