"""The polar factor `U V^T` of a stack of matrices `G = U S V^T`.

It is the direction of steepest ascent in the spectral norm, and the costly part of Muon, Scion and LANTON.
Newton-Schulz iterations reach it with matrix products alone: each step applies an odd polynomial
`p(s) = a s + b s^3 + c s^5` to every singular value, `X <- (a I + b X X^T + c (X X^T)^2) X`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError

Triple = tuple[float, float, float]

_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)


def _safe(triple: Triple, factor: float = 1.01) -> Triple:
    """`p(s / factor)`: room for singular values that rounding has pushed above one (Polar Express, section 3.4)."""
    a, b, c = triple
    return a / factor, b / factor**3, c / factor**5


POLYNOMIALS: dict[str, tuple[Triple, ...]] = {
    # Jordan 2024 (Muon): steep at zero, and content with singular values between 0.68 and 1.14.
    "quintic": ((3.4445, -4.7750, 2.0315),) * 5,
    # You Jiacheng 2025, one triple a step: the same cost, singular values nearer to one.
    "quintic_tuned": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel et al. 2025 (arXiv 2505.16932): minimax-optimal for singular values in [1e-3, 1]; five steps, and all eight.
    "polar_express": tuple(_safe(triple) for triple in _POLAR_EXPRESS[:5]),
    "polar_express8": (*(_safe(triple) for triple in _POLAR_EXPRESS), (1.875, -1.25, 0.375)),
}
METHODS = ("auto", *POLYNOMIALS, "svd")


def polar(g: Tensor, method: str = "auto") -> Tensor:
    """The polar factor of each matrix of a stack.

    Args:
        g: `[..., d_out, d_in]`, real floating point.
        method: `"quintic"` (Muon's five Newton-Schulz steps; `"auto"` means this), `"quintic_tuned"`,
            `"polar_express"`, `"polar_express8"`, or `"svd"` (exact; null directions are left out).

    Returns:
        A stack of the same shape and dtype. Zero matrices give zero; the scale of a matrix does not matter,
        from the smallest to the largest numbers of its dtype. Newton-Schulz works in float64 for float64
        input, in bfloat16 on GPUs that have it in hardware, and in float32 otherwise.

    Raises:
        LayerwiseError: an unknown method, or a tensor that is not a stack of real matrices.
    """
    check_stack(g)
    if method not in METHODS:
        raise LayerwiseError(f"polar method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if g.numel() == 0:
        return torch.zeros_like(g)
    if method == "svd":
        return _svd_polar(g)
    x = normalise(g.to(iteration_dtype(g)))
    wide = x.size(-2) <= x.size(-1)
    x = _newton_schulz(x if wide else x.mT, POLYNOMIALS["quintic" if method == "auto" else method])
    return (x if wide else x.mT).to(g.dtype)


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
    """What Newton-Schulz runs in: bfloat16 only where the hardware multiplies it (28 to 49 times slower on a CPU without)."""
    if g.is_cuda and g.dtype != torch.float64 and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return working_dtype(g)


def normalise(g: Tensor) -> Tensor:
    """Each matrix divided by its Frobenius norm, so that no singular value exceeds one; zero stays zero.

    The largest entry is divided out first: squares of entries beyond 1e19 or below 1e-23 would leave float32's range.
    """
    largest = torch.linalg.vector_norm(g, torch.inf, dim=(-2, -1), keepdim=True)
    x = g / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=working_dtype(g))
    return x.div_(norm.clamp_(min=1.0))  # at least 1 (the largest entry), except for a zero matrix


def _newton_schulz(x: Tensor, triples: tuple[Triple, ...]) -> Tensor:
    """The iteration as published, on `[..., n, m]` with `n <= m` and singular values in [0, 1]."""
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def _svd_polar(g: Tensor) -> Tensor:
    """`U V^T` over the directions whose singular value is above rounding, as `torch.linalg.matrix_rank` counts them."""
    x = normalise(g.to(working_dtype(g)))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    cut = s[..., :1] * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    return ((u * (s > cut).unsqueeze(-2)) @ vh).to(g.dtype)
