"""The nuclear norm (sum of singular values) of a stack of matrices: the dual of the spectral norm, LANTON's measure of noise."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.geometry.polar import check_stack, polar, working_dtype

METHODS = ("auto", "svd", "gram", "polar", "lanczos")
Seed = int | Tensor


def nuclear_norm(
    g: Tensor, method: str = "auto", *, seed: Seed = 0, probes: int = 1, steps: int = 8
) -> Tensor:
    """The nuclear norm of each matrix of a stack.

    Args:
        g: `[..., d_out, d_in]`, real floating point.
        method: `"svd"` (exact), `"gram"` (eigenvalues of the Gram matrix: exact but for singular values below
            3e-4 of the largest), `"polar"` (`<G, P(G)>` with eight Polar Express steps), `"lanczos"` (stochastic
            Lanczos quadrature, two passes over the matrix a step), or `"auto"`: `"polar"` for up to 64 rows or
            columns, else `"lanczos"`.
        seed: picks the random probes of `"lanczos"`: an int, or an integer tensor on the device (so that a compiled
            step takes a new value without recompiling). The global random state is neither read nor changed.
        probes, steps: of `"lanczos"`.

    Returns:
        `[...]`, in float32 (float64 for float64 input).

    Raises:
        LayerwiseError: an unknown method, or a tensor that is not a stack of real matrices.
    """
    check_stack(g)
    if method not in METHODS:
        raise LayerwiseError(f"nuclear norm method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    g = g.to(working_dtype(g))
    if g.numel() == 0:
        return g.new_zeros(g.shape[:-2])
    largest = torch.linalg.vector_norm(g, torch.inf, dim=(-2, -1), keepdim=True)
    x = g / torch.where(largest > 0, largest, 1.0)
    if x.size(-2) > x.size(-1):
        x = x.mT
    if method == "auto":
        method = "polar" if x.size(-2) <= 64 else "lanczos"
    if method == "svd":
        value = torch.linalg.svdvals(x).sum(-1)
    elif method == "gram":
        value = torch.linalg.eigvalsh(x @ x.mT).clamp_(min=0).sqrt().sum(-1)
    elif method == "polar":
        value = (x * polar(x, "polar_express8")).sum((-2, -1))
    else:
        value = _lanczos(x, seed, probes, steps)
    return value * largest[..., 0, 0]


def _rademacher(shape: tuple[int, ...], seed: Seed, like: Tensor) -> Tensor:
    """Random signs from a hash of (seed, position): the same on every device, in every process, in any order of calls."""
    count = 1
    for size in shape:
        count *= size
    x = torch.arange(count, device=like.device) + (seed * 0x1E3779B1 + 0x1234567) % 0x7FFFFFFF
    for multiplier in (0x7FEB352D, 0x45D9F3B, 0x119DE1F3):  # all below 2^31, so that no product leaves int64
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * multiplier
    return ((x >> 20) & 1).to(like.dtype).mul_(2).sub_(1).reshape(shape)


def _lanczos(x: Tensor, seed: Seed, probes: int, steps: int) -> Tensor:
    """Stochastic Lanczos quadrature of `tr (X X^T)^(1/2)`, by Golub-Kahan bidiagonalisation, on `[..., n, m]`, `n <= m`.

    `X^T` is bidiagonalised from a random sign vector z; with L the lower bidiagonal matrix of its coefficients,
    `z^T (X X^T)^(1/2) z ~ n e_1^T (L L^T)^(1/2) e_1 = n L_11 W_11`, W the polar factor of L: a few tiny products
    instead of an eigendecomposition, which would make a GPU wait for the host.
    """
    n = x.size(-2)
    steps = min(steps, n)
    # The same probes for every matrix of a stack: a value does not depend on which matrices are measured together.
    u = _rademacher((n, probes), seed, x) / n**0.5
    lower = x.new_zeros((*x.shape[:-2], probes, steps, steps))
    v = x.mT @ u
    for k in range(steps):
        if k > 0:
            u = x @ v - u * alpha  # noqa: F821  (set in the step before)
            beta = torch.linalg.vector_norm(u, dim=-2, keepdim=True)
            u = u / torch.where(beta > 0, beta, 1.0)
            v = x.mT @ u - v * beta
            lower[..., k, k - 1] = beta.squeeze(-2)
        alpha = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
        v = v / torch.where(alpha > 0, alpha, 1.0)
        lower[..., k, k] = alpha.squeeze(-2)
    quadrature = lower[..., 0, 0] * polar(lower, "polar_express8")[..., 0, 0]
    return n * quadrature.mean(-1)
