"""The spectral norm as a geometry: its unit step is the polar factor `U V^T` of a matrix `G = U S V^T`, its dual the nuclear
norm, the sum of the singular values.

The polar factor is the costly part of Muon, Scion and LANTON. Newton-Schulz iterations reach it with matrix products alone:
each step applies an odd polynomial `p(s) = a s + b s^3 + c s^5` to every singular value. The nuclear norm is LANTON's noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from layerwise.common.checked import checked
from layerwise.common.tensors import largest_entry, wide_dtype
from layerwise.errors import LayerwiseError
from layerwise.geometry.layout import remember
from layerwise.geometry.norms import Geometry
from layerwise.geometry.spectral.lanczos import Seed, exact_polar, finite_or_zero, nuclear_estimate, square_norm, steps_for
from layerwise.geometry.spectral.newton_schulz import (
    PATHS,
    POLYNOMIALS,
    PRECISIONS,
    check_stack,
    iteration_dtype,
    newton_schulz,
    normalised_in,
    passes_count,
    working_dtype,
)
from layerwise.geometry.spectral.shifted_squares import polar_by_shifted_squares

POLAR_METHODS = ("auto", *POLYNOMIALS, "svd")
NUCLEAR_METHODS = ("auto", "svd", "gram", "polar", "lanczos")

#: Up to so many rows or columns `auto` takes an exact nuclear norm, and which: it costs no more there than the estimate.
ON_CPU, ON_GPU = ("gram", 128), ("polar", 64)

PolarMethod = Annotated[str, f"one of {', '.join(POLAR_METHODS)}", POLAR_METHODS.__contains__]
NuclearMethod = Annotated[str, f"one of {', '.join(NUCLEAR_METHODS)}", NUCLEAR_METHODS.__contains__]
Precision = Annotated[str, f"one of {', '.join(PRECISIONS)}", PRECISIONS.__contains__]
Taps = Annotated[int, "the product of the kernel size, at least 1", lambda taps: taps >= 1]


@checked
@dataclass(frozen=True)
class Spectral(Geometry):
    """RMS to RMS operator norm, `sqrt(d_in / d_out) sigma_max`; dual `sqrt(d_out / d_in)` nuclear.

    The unit step is `sqrt(d_out / d_in) U V^T`.

    A convolution seen as a `[out, in * taps]` matrix (`taps` = the product of its kernel size) takes Scion's
    SpectralConv: with `in = d_in / taps` channels the unit step is `sqrt(out / in) / taps * U V^T`, so the norm is
    `taps sqrt(in / out) sigma_max` and the dual `sqrt(out / in) / taps` nuclear.

    `polar` and `nuclear` name the methods of `lw.polar` and `lw.nuclear_norm`. Exact ones give the
    identities of a geometry to rounding; with `polar="quintic"` the norm of a unit step lies between 0.67 and 1.21.
    `precision` is that of the polar factor: `"auto"` (what the device multiplies fastest), `"float32"` or `"bfloat16"`. It
    is not part of the `repr`: a run may go on in another.

    Examples:
        >>> weight = torch.tensor([[3.0, 0.0], [0.0, -2.0]])
        >>> geometry = lw.Spectral(polar="svd", nuclear="svd")
        >>> geometry.lmo(weight).round(decimals=4)
        tensor([[ 1.,  0.],
                [ 0., -1.]])
        >>> float(geometry.norm(weight)), float(geometry.dual_norm(weight))
        (3.0, 5.0)
    """

    polar: PolarMethod = "auto"
    nuclear: NuclearMethod = "auto"
    taps: Taps = 1
    precision: Precision = field(default="auto", repr=False)
    family: ClassVar[str] = "spectral"

    def norm(self, x: Tensor) -> Tensor:
        check_stack(x)
        top = torch.linalg.matrix_norm(x.to(working_dtype(x)), ord=2)
        return top / _spectral_factor(self.taps, *x.shape[-2:])

    def dual_norm(self, g: Tensor, *, seed: Seed = 0) -> Tensor:
        return nuclear_norm(g, self.nuclear, seed=seed) * _spectral_factor(self.taps, *g.shape[-2:])

    def lmo(self, g: Tensor) -> Tensor:
        return polar(g, self.polar, precision=self.precision, scale=_spectral_factor(self.taps, *g.shape[-2:]))

    def unit_rms(self, d_out: int, d_in: int) -> float:
        return _spectral_factor(self.taps, d_out, d_in) / math.sqrt(max(d_out, d_in))

    def white_noise_dual(self, d_out: int, d_in: int) -> float:
        """All `min(d_out, d_in)` singular values taken as `sqrt(max(d_out, d_in))` (0.85 of it for a square matrix)."""
        return _spectral_factor(self.taps, d_out, d_in) * min(d_out, d_in) * math.sqrt(max(d_out, d_in))


@remember
def _spectral_factor(taps: int, d_out: int, d_in: int) -> float:
    """`sqrt(out / in) / taps`, with `in = d_in / taps` channels."""
    if d_in % taps:
        raise LayerwiseError(f"Spectral(taps={taps}) does not divide d_in = {d_in} of a {d_out} x {d_in} matrix")
    return math.sqrt(d_out / (d_in // taps)) / taps


@checked
def spectral_conv(kernel_size: int | Sequence[int]) -> Spectral:
    """Scion's SpectralConv for a convolution seen as `[out, in * taps]`.

    `kernel_size` as in the module (`(3, 1)`; one entry for a 1-d convolution); an int k means a square k x k kernel.

    Examples:
        >>> lw.spectral_conv(3)
        Spectral(polar='auto', nuclear='auto', taps=9)
        >>> lw.spectral_conv((5,))
        Spectral(polar='auto', nuclear='auto', taps=5)
    """
    sizes = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    return Spectral(taps=math.prod(sizes))


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
    given = (("method", method, POLAR_METHODS), ("path", path, PATHS), ("precision", precision, PRECISIONS))
    for what, word, known in given:
        if word not in known:
            raise LayerwiseError(f"polar {what} {word!r} is unknown; choose one of {', '.join(known)}")
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


def _svd_polar(g: Tensor) -> Tensor:
    """`U V^T` over the directions whose singular value is above rounding, as `torch.linalg.matrix_rank` counts them."""
    x = normalised_in(g, working_dtype(g))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    cut = s[..., :1] * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    factor: Tensor = (u * (s > cut).unsqueeze(-2)) @ vh
    return factor.to(g.dtype)


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
            Up to four rows a probe (six above 2048), and on Apple's GPUs, which have no float64, it is the exact
            method of `"auto"`.
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
    if method not in NUCLEAR_METHODS:
        raise LayerwiseError(f"nuclear norm method {method!r} is unknown; choose one of {', '.join(NUCLEAR_METHODS)}")
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
        rows = x.size(-2)
        small = method == "auto" and rows <= up_to
        whole = rows <= probes * steps_for(rows)  # there the Krylov space is everything
        method = exact if small or whole or wide_dtype(x.device) != torch.float64 else "lanczos"
    if method == "lanczos" and passes_count(x):
        square = square_norm(x)  # of a usual matrix nothing leaves the range, so it is read once instead of three times
        if ((square > 1e-12) & (square < 1e36)).all():
            return _estimate(x, square, seed, probes)
    largest = largest_entry(x, (-2, -1))
    largest = torch.where(largest > 0, largest, 1.0)
    x = x / largest  # squares of the entries stay in range
    if method == "svd":
        norm = torch.linalg.svdvals(x).sum(-1)
    elif method == "gram":
        gram = x @ x.mT
        norm = torch.linalg.eigvalsh(finite_or_zero(gram)).clamp_(min=0).sqrt().sum(-1)
        norm = norm + 0 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # nan where an entry of x is no number
    elif method == "polar":
        norm = (x * exact_polar(x)).sum((-2, -1))
    else:
        norm = _estimate(x, square_norm(x), seed, probes)
    return norm * largest[..., 0, 0]


def _estimate(x: Tensor, square: Tensor, seed: Seed, probes: int) -> Tensor:
    stack = x.reshape(-1, *x.shape[-2:])
    value = nuclear_estimate(stack, square.reshape(-1), seed, probes, steps_for(x.size(-2)))
    return value.to(x.dtype).reshape(x.shape[:-2])
