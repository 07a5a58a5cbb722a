"""Newton-Schulz in bfloat16 on a processor, where every pass over a matrix counts beside products this fast.

With `G = X X^T` and `X = k Z`, completing the square turns a step `X <- (a I + b G + c G^2) X` into

    Z <- ((Z Z^T + s I)^2 + d I) Z,    s = b / (2 c k^2),    d = (a - b^2 / 4 c) / (c k^4),    k <- c k^5

whose products have neither factors nor addends (a third of a product's time at n = 384); s and d touch diagonals alone. The
last k is chosen: it is one over what the result is to be multiplied by. Nor is a larger matrix normalised: it is rounded as
it comes, the trace of its Gram matrix is its squared norm, and the first square takes that in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.common.tensors import remember
from layerwise.geometry.spectral.newton_schulz import (
    GRAM_FROM,
    Triple,
    apply_symmetric,
    matrices_at_once,
    strip_product,
)
from layerwise.geometry.spectral.precision import normalised_in

#: Steps on one Gram matrix from `GRAM_FROM` on (6 r + 11 products for five steps instead of 10 r + 5; 35 and 45 where
#: m = 4 n). With three at once falling spectra were 0.3 off where single steps and pairs are 0.13 to 0.15: each step
#: multiplies the rounding of a Gram matrix by up to 12.
PAIR = 2
#: Polynomials that rise so fast from zero go one by one: pairs of Polar Express (8.2) were 1.3 off on real momentum.
STEEP = 5.0
#: Squared norms whose fourth powers, and their inverses, stay well inside bfloat16's range.
LEAST, MOST = 1e-14, 1e14
#: From so many entries on a matrix is read once less and divided never. Below, squares of which each has a factor of its own
#: are one product at a time: at 384 x 384 that costs as much, at 128 x 128 more.
TRACE_FROM = 2**18

#: The same for all matrices, or one for each, `[k, 1]`.
Shift = float | Tensor


def polar_by_shifted_squares(g: Tensor, triples: tuple[Triple, ...], path: str, scale: float) -> Tensor:
    """All steps on `[k, n, m]`, `n <= m`: `scale` times the polar factors, in the dtype of g. "gram" asks for pairs."""
    n, m = g.shape[-2:]
    wide = path == "gram" or (path == "auto" and m >= GRAM_FROM * n)
    at_once = PAIR if wide and triples[0][0] < STEEP else 1
    shifts, found = shifts_of(triples, scale), torch.empty_like(g)
    size = matrices_at_once(n, m, torch.bfloat16.itemsize)
    for part, into in zip(g.split(size), found.split(size), strict=True):
        into.copy_(_iterate(part, shifts, at_once))
    return found


@remember
def shifts_of(triples: tuple[Triple, ...], scale: float) -> tuple[Triple, ...]:
    """`(s, s^2 + d, k)` of each step, such that the last one ends at `k = 1 / scale`."""
    k, found = 1 / scale, []
    for a, b, c in reversed(triples):
        k = (k / c) ** 0.2
        found.append((b / (2 * c * k**2), a / (c * k**4), k))
    return tuple(reversed(found))


def _iterate(g: Tensor, shifts: tuple[Triple, ...], at_once: int) -> Tensor:
    k, n, _ = g.shape
    gram, p, q, spare = g.new_empty(4, k, n, n, dtype=torch.bfloat16).unbind()
    x, unit = _rounded(g, gram, shifts[0][2])
    y = torch.empty_like(x)
    for start in range(0, len(shifts), at_once):
        if start > 0:
            strip_product(x, x.mT, gram)
        end = min(start + at_once, len(shifts))
        for step in range(start, end):
            into = q if step == start else p
            s, at_zero, _ = shifts[step]
            if step > 0 or unit is None:
                diagonal = _shifted_square(gram, s, at_zero, into)
            else:  # of `unit Z`, and the polynomial over unit: from here on all is of Z
                diagonal = _shifted_square(gram, s * unit**2, at_zero / unit, into, unit**-5)
            if step < end - 1:
                gram.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
                strip_product(gram, into, spare)
                strip_product(spare, into, gram)
            if step > start:
                q, spare = strip_product(q, p, spare), q
        x, y = apply_symmetric(q, x, out=y), x
    return x


def _rounded(g: Tensor, gram: Tensor, k: float) -> tuple[Tensor, Tensor | None]:
    """X in bfloat16, its Gram matrix in `gram`, and how many times Z it is, `[k, 1]` in float32; None where it is Z."""
    if g[0].numel() >= TRACE_FROM:
        x = g.to(torch.bfloat16)
        strip_product(x, x.mT, gram)
        square = gram.diagonal(dim1=-2, dim2=-1).float().sum(-1, keepdim=True)
        if ((square > LEAST) & (square < MOST)).all():
            return x, square.sqrt() * k
    x = normalised_in(g, torch.bfloat16, 1 / k)
    strip_product(x, x.mT, gram)
    return x, None


def _shifted_square(gram: Tensor, s: Shift, at_zero: Shift, out: Tensor, factor: Tensor | None = None) -> Tensor:
    """`factor (G + s I)^2 + d I` into out, d such that a G of zero gives `at_zero`; G keeps s, its diagonal is returned.

    Entries of a diagonal are small beside s, so rounding their sums hides them; what it has added goes out again with d.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    before = diagonal.float()
    diagonal.copy_(before + s)  # rounded once
    added = diagonal - before  # s, and the rounding of its sum with each entry
    if factor is None:
        strip_product(gram, gram, out)
    else:
        for matrix, into, own in zip(gram, out, factor[:, 0].tolist(), strict=True):
            strip_product(matrix, matrix, into, alpha=own)
    slope = s if factor is None else s * factor
    out.diagonal(dim1=-2, dim2=-1).add_(at_zero + s * slope - added.mul_(2 * slope))
    return before
