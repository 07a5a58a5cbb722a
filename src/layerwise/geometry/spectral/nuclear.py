"""The nuclear norm (sum of singular values) of a stack of matrices: the dual of the spectral norm, LANTON's noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerwise.common.tensors import or_one
from layerwise.errors import LayerwiseError
from layerwise.geometry.spectral.newton_schulz import CHUNK_BYTES, POLYNOMIALS, newton_schulz
from layerwise.geometry.spectral.polar import check_stack, largest_entry, normalise, working_dtype

METHODS = ("auto", "svd", "gram", "polar", "lanczos")
Seed = int | Tensor

#: Up to this many rows or columns `auto` takes `polar`: products so small that they cost less than a quadrature.
POLAR_UP_TO = 64
#: Gauss quadrature is above the integral of a square root and Radau's below. How far up between the two the truth lies
#: grows with the flatness of the spectrum, here Gauss's value over the largest that the Frobenius norm allows: from 0.3 on
#: gradient differences dominated by one direction to 1 on white noise. A line is enough; the error is in the docstring.
GAUSS_SHARE, FLAT_SHARE = 0.3, 0.7


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
            `"lanczos"`: block Lanczos quadrature from random vectors; 6 % (standard deviation; 1 % on white noise), mean
            0 to 4 %. Singular values spread evenly over decades come out tens of per cent too large. It reads the matrix
            three times and waits for nothing.
            `"auto"`: `"polar"` for matrices of up to 64 rows or columns, else `"lanczos"`.
        seed: picks the random probes of `"lanczos"`: an int, or an integer tensor on the device (so that a compiled
            step takes a new value without recompiling), of shape [] or with one entry a matrix, `[...]`. Matrices of one
            shape and seed share their probes. The global random state is neither read nor changed.
        probes: how many random vectors `"lanczos"` starts from.

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
    if probes < 1:
        raise LayerwiseError(f"nuclear_norm(probes={probes}): give at least 1")
    x = g.to(working_dtype(g))
    if x.numel() == 0:
        return x.new_zeros(x.shape[:-2])
    largest = or_one(largest_entry(x))
    x = x / largest  # squares of the entries stay in range
    if x.size(-2) > x.size(-1):
        x = x.mT
    if method == "auto":
        method = "polar" if x.size(-2) <= POLAR_UP_TO else "lanczos"
    if method == "svd":
        value = torch.linalg.svdvals(x).sum(-1)
    elif method == "gram":
        value = torch.linalg.eigvalsh(x @ x.mT).clamp_(min=0).sqrt().sum(-1)
    elif method == "polar":
        value = (x * _exact_polar(x)).sum((-2, -1))
    else:
        value = _lanczos(x.reshape(-1, *x.shape[-2:]), seed, probes).reshape(x.shape[:-2])
    return value * largest[..., 0, 0]


def _exact_polar(x: Tensor) -> Tensor:
    """The polar factor of wide matrices within 1e-5, in the precision of x (`polar` would take bfloat16 on a GPU)."""
    factor = newton_schulz(normalise(x).reshape(-1, *x.shape[-2:]), POLYNOMIALS["polar_express8"])
    return factor.reshape(x.shape)


def _lanczos(x: Tensor, seed: Seed, probes: int) -> Tensor:
    """Stochastic Lanczos quadrature of `tr (X X^T)^(1/2)` on `[k, n, m]`, `n <= m`, entries up to one.

    For random signs z, `E z^T f(X X^T) z = tr f(X X^T)`. All probes together start one block Golub-Kahan
    bidiagonalisation, so that each sees the subspace of all: with Z = R U a small matrix B comes out whose
    `R f(B B^T)_11 R^T` is a quadrature of `Z f(X X^T) Z^T`: Gauss's after three readings of X, Radau's (a node at zero)
    after two. With 8 probes one by one eight readings were needed for twice the error.

    Gradients are dominated by a few singular values, and whether z meets those makes plain estimates useless (error
    70 % with 4 probes). But the same Z gives an estimate of `tr X X^T = ||X||_F^2`, which is known: what it is off by is
    taken out of the square root's estimate, times the regression slope `m_3 / m_4` of the measured spectrum (moments
    in s). Exact for rank one.
    """
    k, n, _ = x.shape
    z = _random_signs((probes, n), seed, x).expand(k, probes, n)
    chunk = k if x.device.type != "cpu" else max(1, CHUNK_BYTES // (x[0].numel() * x.element_size()))
    parts = [_bidiagonalise(part, u) for part, u in zip(x.split(chunk), z.split(chunk), strict=True)]
    start, gauss = (torch.cat(part) for part in zip(*parts, strict=True))
    radau = gauss.clone()
    radau[..., probes:] = 0
    both = torch.stack([gauss, radau])  # [2, k, 2 probes, 2 probes]
    # (B B^T)^(1/2) = B W^T with W the polar factor of B: a few tiny products where an eigendecomposition would make a GPU
    # wait for the host. Of every power only the first block column is needed.
    root = both @ _exact_polar(both)[..., :probes, :].mT
    square = gauss @ gauss[..., :probes, :].mT
    weights = start.mT @ start / probes

    def moment(block: Tensor) -> Tensor:
        return (weights * block[..., :probes, :]).sum((-2, -1)).to(x.dtype)

    frobenius: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    largest = math.sqrt(n) * frobenius  # and frobenius is the smallest value of any nuclear norm
    second, third, fourth = moment(square), moment(square.mT @ root[0]), moment(square.mT @ square)
    surplus = third / or_one(fourth) * (second - frobenius.square())
    gauss_value, radau_value = moment(root[0]) - surplus, moment(root[1]) - surplus
    share = GAUSS_SHARE + FLAT_SHARE * (gauss_value / or_one(largest)).clamp(0, 1)
    value = torch.lerp(radau_value, gauss_value, share)
    return torch.minimum(torch.maximum(value, frobenius), largest)


def _bidiagonalise(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Two steps of block Golub-Kahan from the rows of z: R with `Z = R U`, and the block lower bidiagonal B = U X V^T.

    `[k, probes, probes]` and `[k, 2 probes, 2 probes]`, in float64. Vectors are rows: on a CPU `u X` is several times
    faster than `X^T u` with the vectors as columns.
    """
    p = z.size(1)
    start, u = _orthonormal(z)
    first, v = _orthonormal(torch.bmm(u, x))
    below, w = _orthonormal(torch.bmm(v, x.mT) - first.mT.to(x.dtype) @ u)
    second, _ = _orthonormal(torch.bmm(w, x) - below.mT.to(x.dtype) @ v)
    out = start.new_zeros(x.size(0), 2 * p, 2 * p)
    out[:, :p, :p], out[:, p:, :p], out[:, p:, p:] = first, below.mT, second
    return start, out


def _orthonormal(w: Tensor) -> tuple[Tensor, Tensor]:
    """`W = L Q` with orthonormal rows in Q (zero, or noise, where W has lower rank) and L lower triangular, in float64.

    Cholesky of the Gram matrix: in float64 its squares lose nothing that float32 rows have. Nothing is checked, so that
    a GPU's host need not wait; what is added to the diagonal keeps a Gram matrix of low rank positive.
    """
    rows = w.double()
    gram = rows @ rows.mT
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(1e-14 * diagonal.sum(-1, keepdim=True) + 1e-30)
    factor = torch.linalg.cholesky_ex(gram).L
    identity = torch.eye(w.size(-2), dtype=rows.dtype, device=w.device)
    q = torch.linalg.solve_triangular(factor, identity, upper=False) @ rows
    return factor, q.to(w.dtype)


def _random_signs(shape: tuple[int, int], seed: Seed, like: Tensor) -> Tensor:
    """Signs `[1 or k, *shape]` from a hash of (seed, position): the same on every device, in every process and batch."""
    bits = torch.arange(math.prod(shape), device=like.device)
    if isinstance(seed, Tensor):
        seed = seed.to(like.device, torch.int64).reshape(-1, 1)
    bits = bits + seed * 0x1E3779B1 % 0x7FFFFFFF
    for multiplier in (
        0x7FEB352D,
        0x45D9F3B,
        0x119DE1F3,
    ):  # below 2^31, so that no product of 32 bits leaves int64
        bits = bits & 0xFFFFFFFF
        bits = (bits ^ (bits >> 16)) * multiplier
    return ((bits >> 20) & 1).to(like.dtype).mul_(2).sub_(1).reshape(-1, *shape)
