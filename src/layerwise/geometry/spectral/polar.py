"""The polar factor `U V^T` of a stack of matrices `G = U S V^T`.

It is the direction of steepest ascent in the spectral norm, and the costly part of Muon, Scion and LANTON.
Newton-Schulz iterations reach it with matrix products alone: each step applies an odd polynomial
`p(s) = a s + b s^3 + c s^5` to every singular value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.geometry.spectral.newton_schulz import PATHS, POLYNOMIALS, newton_schulz

METHODS = ("auto", *POLYNOMIALS, "svd")


@torch.no_grad()
def polar(g: Tensor, method: str = "auto", *, path: str = "auto") -> Tensor:
    """The polar factor of each matrix of a stack. Not differentiable.

    Args:
        g: `[..., d_out, d_in]`, real floating point.
        method: which polynomials. Singular values of the result, for those of G above 3e-3 of its Frobenius norm:
            `"quintic"` (Muon's five steps; `"auto"` means this) in [0.68, 1.21], `"quintic_tuned"` in
            [0.97, 1.15] and above 1e-2 [0.97, 1.04], `"polar_express"` in [0.87, 1.13], `"polar_express8"`
            within 1e-5 of one, `"svd"` exact (null directions are left out).
        path: how Newton-Schulz computes them: `"standard"`, `"blocked"`, `"gram"` (see
            `layerwise.geometry.spectral.newton_schulz`), or `"auto"`, by shape and device; the same numbers to rounding.

    Returns:
        A stack of the same shape and dtype. Zero matrices give zero; the scale of a matrix does not matter,
        from the smallest to the largest numbers of its dtype. Newton-Schulz works in float64 for float64
        input, in bfloat16 on GPUs that have it in hardware (float16 on the Gram paths), and in float32 otherwise.

    Raises:
        LayerwiseError: an unknown method or path, or a tensor that is not a stack of real matrices.

    Examples:
        >>> lw.polar(torch.tensor([[3.0, 0.0], [0.0, -2.0]]), "svd").round(decimals=4)
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    check_stack(g)
    if method not in METHODS:
        raise LayerwiseError(f"polar method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if path not in PATHS:
        raise LayerwiseError(f"polar path {path!r} is unknown; choose one of {', '.join(PATHS)}")
    if g.numel() == 0:
        return torch.zeros_like(g)
    if method == "svd":
        return _svd_polar(g)
    x = _normalised_in(g, iteration_dtype(g), path).reshape(-1, *g.shape[-2:])
    wide = x.size(-2) <= x.size(-1)
    x = newton_schulz(x if wide else x.mT, POLYNOMIALS["quintic" if method == "auto" else method], path)
    return (x if wide else x.mT).reshape(g.shape).to(g.dtype)


def check_stack(g: Tensor) -> None:
    """Refuse what is not `[..., d_out, d_in]` of real floating-point numbers."""
    if g.ndim < 2 or not g.is_floating_point():
        raise LayerwiseError(
            f"expected a stack of real matrices [..., d_out, d_in], got shape {tuple(g.shape)} of {g.dtype}; "
            "give a vector of d entries as a [d, 1] matrix"
        )


def working_dtype(g: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32: what norms, sums and decompositions are computed in."""
    return torch.float64 if g.dtype == torch.float64 else torch.float32


def iteration_dtype(g: Tensor) -> torch.dtype:
    """What Newton-Schulz runs in: bfloat16 only where hardware multiplies it (a CPU without: 28 to 49 times slower)."""
    if g.is_cuda and g.dtype != torch.float64 and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.promote_types(g.dtype, torch.float32)


def _normalised_in(g: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    """Singular values in [0, 1], in the dtype that the path iterates in.

    That of the Gram paths is float16 where the others have bfloat16: they square singular values, and with bfloat16's 8
    bits real momentum ended up to 2 off (`benchmarks/polar_errors.py`).
    """
    if dtype == torch.bfloat16 and path in ("gram", "triton_gram"):
        return normalise(g.to(torch.float32)).half()  # in range once normalised
    return normalise(g.to(dtype))


def largest_entry(g: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """`max |g|` over dim, which is kept. A maximum and a minimum take a tenth of the time of a norm of order infinity."""
    return torch.maximum(g.amax(dim, keepdim=True), -g.amin(dim, keepdim=True))


def normalise(g: Tensor) -> Tensor:
    """Each matrix divided by its Frobenius norm, so that no singular value exceeds one; zero stays zero.

    The largest entry is divided out first: squares of entries beyond 1e19 or below 1e-23 would leave float32's range.
    """
    largest = torch.maximum(g.amax((-2, -1), keepdim=True), -g.amin((-2, -1), keepdim=True))
    x = g / torch.where(largest > 0, largest, 1.0)
    wide = torch.promote_types(g.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)
    return x.div_(norm.clamp_(min=1.0))  # at least 1 (the largest entry), except for a zero matrix


def _svd_polar(g: Tensor) -> Tensor:
    """`U V^T` over the directions whose singular value is above rounding, as `torch.linalg.matrix_rank` counts them."""
    x = normalise(g.to(working_dtype(g)))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    cut = s[..., :1] * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    factor: Tensor = (u * (s > cut).unsqueeze(-2)) @ vh
    return factor.to(g.dtype)
