"""The polar factor `U V^T` of a stack of matrices `G = U S V^T`.

It is the direction of steepest ascent in the spectral norm, and the costly part of Muon, Scion and LANTON.
Newton-Schulz iterations reach it with matrix products alone: each step applies an odd polynomial
`p(s) = a s + b s^3 + c s^5` to every singular value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.geometry.spectral.newton_schulz import PATHS, POLYNOMIALS, newton_schulz
from layerwise.geometry.spectral.precision import PRECISIONS, iteration_dtype, normalised_in
from layerwise.geometry.spectral.shifted_squares import polar_by_shifted_squares

METHODS = ("auto", *POLYNOMIALS, "svd")


@torch.no_grad()
def polar(g: Tensor, method: str = "auto", *, path: str = "auto", precision: str = "auto", scale: float = 1.0) -> Tensor:
    """The polar factor of each matrix of a stack. Not differentiable.

    Args:
        g: `[..., d_out, d_in]`, real floating point.
        method: which polynomials. Singular values of the result, for those of G above 3e-3 of its Frobenius norm:
            `"quintic"` (Muon's five steps; `"auto"` means this) in [0.68, 1.21], `"quintic_tuned"` in
            [0.97, 1.15] and above 1e-2 [0.97, 1.04], `"polar_express"` in [0.87, 1.13], `"polar_express8"`
            within 1e-5 of one, `"svd"` exact (null directions are left out).
        path: how Newton-Schulz computes them: `"standard"`, `"blocked"`, `"gram"` (see
            `layerwise.geometry.spectral.newton_schulz`), or `"auto"`, by shape and device; the same numbers to rounding.
        scale: what the result is multiplied by; where a processor works in bfloat16 that costs no pass.
        precision: what Newton-Schulz works in: `"bfloat16"`, `"float32"`, or `"auto"`: bfloat16 on a GPU that has it in
            hardware, and on a processor that has for matrices from 128 rows and columns on; else float32. On a
            GPU the Gram paths take float16 where the others take bfloat16. float64 input stays in float64.

    Returns:
        A stack of the same shape and dtype. Zero matrices give zero; the scale of a matrix does not matter,
        from the smallest to the largest numbers of its dtype.

    Raises:
        LayerwiseError: an unknown method, path or precision, a scale that is not above 0, or a tensor that is not a stack
            of real matrices.

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
    if precision not in PRECISIONS:
        raise LayerwiseError(f"polar precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not (torch.compiler.is_compiling() or (is_number and 0.0 < scale < math.inf)):
        raise LayerwiseError(f"polar scale={scale!r}: give a finite number above 0")
    if g.numel() == 0:
        return torch.zeros_like(g)
    if method == "svd":
        return _svd_polar(g).mul_(scale)
    dtype = iteration_dtype(g, precision, gram=path in ("gram", "triton_gram"))
    stack = g.reshape(-1, *g.shape[-2:])
    wide, triples = g.size(-2) <= g.size(-1), POLYNOMIALS["quintic" if method == "auto" else method]
    if dtype == torch.bfloat16 and g.is_cpu and not path.startswith("triton") and not torch.compiler.is_compiling():
        x = polar_by_shifted_squares(stack if wide else stack.mT, triples, path, scale)
        return (x if wide else x.mT).reshape(g.shape)
    x = normalised_in(stack, dtype)
    x = newton_schulz(x if wide else x.mT, triples, path)
    found = (x if wide else x.mT).reshape(g.shape).to(g.dtype)
    return found if scale == 1.0 else found.mul_(scale)


def check_stack(g: Tensor) -> None:
    """Refuse what is not `[..., d_out, d_in]` of real floating-point numbers."""
    if not isinstance(g, Tensor):
        raise LayerwiseError(f"g={g!r}: expected a stack of real matrices [..., d_out, d_in], a tensor")
    if g.ndim < 2 or not g.is_floating_point():
        raise LayerwiseError(
            f"expected a stack of real matrices [..., d_out, d_in], got shape {tuple(g.shape)} of {g.dtype}; "
            "give a vector of d entries as a [d, 1] matrix"
        )


def working_dtype(g: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32: what norms, sums and decompositions are computed in."""
    return torch.float64 if g.dtype == torch.float64 else torch.float32


def _svd_polar(g: Tensor) -> Tensor:
    """`U V^T` over the directions whose singular value is above rounding, as `torch.linalg.matrix_rank` counts them."""
    x = normalised_in(g, working_dtype(g))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    cut = s[..., :1] * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    factor: Tensor = (u * (s > cut).unsqueeze(-2)) @ vh
    return factor.to(g.dtype)
