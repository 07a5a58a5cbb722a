"""The nuclear norm (sum of singular values) of a stack of matrices: the dual of the spectral norm, LANTON's noise."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.common.tensors import or_one
from layerwise.errors import LayerwiseError
from layerwise.geometry.spectral.lanczos import (
    Seed,
    exact_polar,
    finite_or_zero,
    nuclear_estimate,
    square_norm,
    steps_for,
)
from layerwise.geometry.spectral.polar import check_stack, working_dtype
from layerwise.geometry.spectral.precision import largest_entry, passes_count

METHODS = ("auto", "svd", "gram", "polar", "lanczos")

#: Up to so many rows or columns `auto` takes an exact method, and which: it costs no more there than the estimate.
ON_CPU, ON_GPU = ("gram", 128), ("polar", 64)


@torch.no_grad()
def nuclear_norm(g: Tensor, method: str = "auto", *, seed: Seed = 0, probes: int = 8) -> Tensor:
    """The nuclear norm of each matrix of a stack. Not differentiable.

    Args:
        g: `[..., d_out, d_in]`, real floating point.
        method: named with its relative error on gradient differences of a GPT-2 (float32).
            `"svd"`: exact, to rounding.
            `"gram"`: eigenvalues of the Gram matrix; up to 1.3 % too large (rounding hides singular values below
            3e-4 of the largest, and lends as much to those that are zero).
            `"polar"`: `<G, P(G)>` with eight Polar Express steps; up to 0.4 % too small.
            `"lanczos"`: stochastic, below 10 % on the spectra that the tests have: power laws, geometric, log-spaced, low
            rank with a tail, white noise, gradients (one, 32 large values above a tail of three decades, up to 14 %). It
            reads the matrix 7 times, 11 above 2048 rows, and waits for nothing; see `layerwise.geometry.spectral.lanczos`.
            Up to four rows a probe (six above 2048) it is the exact method of `"auto"`.
            `"auto"`: `"gram"` for matrices of up to 128 rows or columns, on a GPU `"polar"` up to 64; else `"lanczos"`.
        seed: picks the random probes of `"lanczos"`: an int, or an integer tensor on the device (so that a compiled
            step takes a new value without recompiling), of shape [] or with one entry a matrix, `[...]`. Matrices of one
            shape and seed share their probes. The global random state is neither read nor changed.
        probes: how many random vectors `"lanczos"` starts from, an even number.

    Returns:
        `[...]`, in float32 (float64 for float64 input).

    Raises:
        LayerwiseError: an unknown method, or a tensor that is not a stack of real matrices.

    Examples:
        >>> lw.nuclear_norm(torch.tensor([[3.0, 0.0], [0.0, -2.0]]), "svd")
        tensor(5.)
    """
    check_stack(g)
    if method not in METHODS:
        raise LayerwiseError(f"nuclear norm method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 2 or probes % 2:
        raise LayerwiseError(f"nuclear_norm(probes={probes!r}): give an even number, at least 2")
    if isinstance(seed, bool) or not isinstance(seed, int | Tensor):
        raise LayerwiseError(f"nuclear_norm(seed={seed!r}): give a whole number or a tensor of them")
    x = g.to(working_dtype(g))
    if x.numel() == 0:
        return x.new_zeros(x.shape[:-2])
    x = x if x.size(-2) <= x.size(-1) else x.mT
    if method in ("auto", "lanczos"):
        exact, up_to = ON_CPU if x.device.type == "cpu" else ON_GPU
        least = probes * steps_for(x.size(-2))  # of a smaller matrix the Krylov space would be everything
        method = exact if x.size(-2) <= (max(least, up_to) if method == "auto" else least) else "lanczos"
    if method == "lanczos" and passes_count(x):
        square = square_norm(x)  # of a usual matrix nothing leaves the range, so it is read once instead of three times
        if ((square > 1e-12) & (square < 1e36)).all():
            return _estimate(x, square, seed, probes)
    largest = or_one(largest_entry(x))
    x = x / largest  # squares of the entries stay in range
    return _norm_by(method, x, seed, probes) * largest[..., 0, 0]


def _norm_by(method: str, x: Tensor, seed: Seed, probes: int) -> Tensor:
    """Of wide matrices with entries up to one."""
    if method == "svd":
        return torch.linalg.svdvals(x).sum(-1)
    if method == "gram":
        gram = x @ x.mT
        value = torch.linalg.eigvalsh(finite_or_zero(gram)).clamp_(min=0).sqrt().sum(-1)
        return value + 0 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # nan where an entry of x is no number
    if method == "polar":
        return (x * exact_polar(x)).sum((-2, -1))
    return _estimate(x, square_norm(x), seed, probes)


def _estimate(x: Tensor, square: Tensor, seed: Seed, probes: int) -> Tensor:
    stack = x.reshape(-1, *x.shape[-2:])
    value = nuclear_estimate(stack, square.reshape(-1), seed, probes, steps_for(x.size(-2)))
    return value.to(x.dtype).reshape(x.shape[:-2])
