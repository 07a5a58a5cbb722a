"""Newton-Schulz in bfloat16 on a processor, where every pass over a matrix counts beside products this fast.

With `G = X X^T` and `X = k Z`, completing the square turns a step `X <- (a I + b G + c G^2) X` into

    Z <- ((Z Z^T + s I)^2 + d I) Z,    s = b / (2 c k^2),    d = (a - b^2 / 4 c) / (c k^4),    k <- c k^5

whose products have neither factors nor addends (a third of a product's time at n = 384); s and d touch diagonals alone. The
last k is chosen: it is one over what the result is to be multiplied by. Nor is a larger matrix normalised: it is rounded as
it comes, the trace of its Gram matrix is its squared norm, and the first square takes that in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.geometry.spectral.newton_schulz import (
    GRAM_FROM,
    Product,
    Quintic,
    matrices_at_once,
    normalised_in,
    on_gram_matrices,
    strip_product,
)

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


def polar_by_shifted_squares(g: Tensor, steps: tuple[Quintic, ...], path: str, scale: float) -> Tensor:
    """All steps on `[k, n, m]`, `n <= m`: `scale` times the polar factors, in the dtype of g. "gram" asks for pairs."""
    n, m = g.shape[-2:]
    wide = path == "gram" or (path == "auto" and m >= GRAM_FROM * n)
    at_once = PAIR if wide and steps[0].a < STEEP else 1
    shifts, found = shifts_of(steps, scale), torch.empty_like(g)
    size = matrices_at_once(n, m, torch.bfloat16.itemsize)
    cuts = [*range(0, len(steps), at_once), len(steps)]
    squares = [ShiftedSquare(s, at_zero) for s, at_zero, _ in shifts]
    for part, into in zip(g.split(size), found.split(size), strict=True):
        x, gram, unit = _rounded(part, shifts[0][2])
        first = squares[0] if unit is None else squares[0].of_multiple(unit)
        into.copy_(on_gram_matrices(x, gram, [first, *squares[1:]], cuts, strip_product))
    return found


def shifts_of(steps: tuple[Quintic, ...], scale: float) -> tuple[tuple[float, float, float], ...]:
    """`(s, s^2 + d, k)` of each step, such that the last one ends at `k = 1 / scale`."""
    k, found = 1 / scale, []
    for a, b, c in reversed(steps):
        k = (k / c) ** 0.2
        found.append((b / (2 * c * k**2), a / (c * k**4), k))
    return tuple(reversed(found))


def _rounded(g: Tensor, k: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """X in bfloat16, its Gram matrix, and how many times Z it is, `[k, 1]` in float32; None where it is Z."""
    if g[0].numel() >= TRACE_FROM:
        x = g.to(torch.bfloat16, copy=True)  # which the steps overwrite
        gram = strip_product(x, x.mT)
        square = gram.diagonal(dim1=-2, dim2=-1).float().sum(-1, keepdim=True)
        if ((square > LEAST) & (square < MOST)).all():
            return x, gram, square.sqrt() * k
    x = normalised_in(g, torch.bfloat16, 1 / k)
    return x, strip_product(x, x.mT), None


class ShiftedSquare(NamedTuple):
    """`factor (G + s I)^2 + d I`, d such that a G of zero gives `at_zero`; a factor for each matrix, `[k, 1]`, or none.

    Entries of a diagonal are small beside s, so rounding their sums hides them; what it has added goes out again with d.
    """

    s: float | Tensor
    at_zero: float | Tensor
    factor: Tensor | None = None

    def of_multiple(self, unit: Tensor) -> ShiftedSquare:
        """For a Gram matrix of `unit Z`: over `unit`, so that from there on all is of Z."""
        return ShiftedSquare(self.s * unit**2, self.at_zero / unit, unit**-5)

    def of(self, gram: Tensor, product: Product, out: Tensor, last: bool) -> Tensor:
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        before = diagonal.float()
        shifted = (before + self.s).to(gram.dtype)  # rounded once; diagonals are read and written as little as can be
        diagonal.copy_(shifted)
        slope = self.s
        if self.factor is None:
            product(gram, gram, out)
        else:
            slope = self.s * self.factor
            for matrix, into, own in zip(gram, out, self.factor[:, 0].tolist(), strict=True):
                product(matrix, matrix, into, alpha=own)
        taken = torch.sub(before, shifted)  # -s, and the rounding of its sum with each entry
        out.diagonal(dim1=-2, dim2=-1).add_(taken.mul_(2 * slope).add_(self.at_zero + self.s * slope))
        if not last:
            diagonal.copy_(before)
        return out
