"""Spectral norms of many matrices at once, estimated from below in a few products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerwise.common.tensors import or_one

#: What adds a tensor over the processes that hold parts of one matrix, in place.
Sum = Callable[[Tensor], Tensor]
#: Matrices of more entries are multiplied one by one on a CPU: there starting an operation costs nothing beside it.
_LARGE = 1 << 14


@dataclass
class _Bidiagonal:
    """Golub-Kahan-Lanczos on a stack of matrices: `A V = U B`, with B upper bidiagonal.

    Where rows of the matrices are spread over processes, `left` is this process's rows and `right` is everywhere the same.
    """

    matrices: Tensor  # [count, rows, columns]
    right: Tensor  # [count, columns, 1]
    diagonal: list[Tensor] = field(default_factory=list)  # [count] each
    above: list[Tensor] = field(default_factory=list)
    left: Tensor | None = None

    def products(self) -> Tensor:
        """The next left vector times A, and the left vector's squared norm: `[count, columns + 1]`, to be summed."""
        left = _times(self.matrices, self.right)
        if self.left is not None:
            left -= self.above[-1][:, None, None] * self.left
        self.left = left
        # Not `matrices.mT @ left`, which a CPU takes 20 times as long for.
        back = torch.bmm(left.mT, self.matrices)
        return torch.cat([back[:, 0], left.square().sum((1, 2))[:, None]], 1)

    def extend(self, summed: Tensor) -> None:
        """One more row of B, from the sums over processes of `products`."""
        assert self.left is not None
        length = summed[:, -1].clamp_min(0).sqrt()
        inverse = torch.where(length > 0, 1 / length, 0.0)
        self.left = self.left * inverse[:, None, None]
        right = summed[:, :-1, None] * inverse[:, None, None] - length[:, None, None] * self.right
        rest = right.norm(dim=(1, 2))
        self.right = right * torch.where(rest > 0, 1 / rest, 0.0)[:, None, None]
        self.diagonal.append(length)
        self.above.append(rest)

    def norms(self) -> Tensor:
        """The largest singular value of B, `[count]`, on the CPU: never above that of the matrices, but for rounding."""
        bidiagonal = torch.diag_embed(torch.stack(self.diagonal, -1))
        if len(self.above) > 1:
            bidiagonal += torch.diag_embed(torch.stack(self.above[:-1], -1), 1)
        # NaN and inf, which the decomposition refuses, are what the norm then is.
        bidiagonal = bidiagonal.cpu()  # so small that a device takes longer, and its user wants numbers
        finite = bidiagonal.isfinite().all(-1).all(-1)
        singular = torch.linalg.svdvals(torch.where(finite[:, None, None], bidiagonal, 0.0))[:, 0]
        return torch.where(finite, singular, math.nan)


def spectral_norms(stacks: Sequence[Tensor], steps: int = 6, sum_: Sum | None = None) -> list[Tensor]:
    """Estimates of the spectral norms of matrices, from below.

    `steps` steps of Golub-Kahan-Lanczos bidiagonalisation from a fixed vector: two products with each matrix a step. Six
    steps are within a few per cent for the updates of training (tests hold them against an SVD), and exact from
    `min(rows, columns)` steps on.

    Args:
        stacks: matrices of equal shape together, `[count, rows, columns]` each, float32 or float64.
        steps: of the bidiagonalisation.
        sum_: where rows of matrices are spread over processes, or whole matrices are on all of them scaled so that their
            squares add up to one matrix's: adds a tensor over processes. All stacks go in one exchange a step.

    Returns:
        For each stack its norms, `[count]`, on the CPU.

    Examples:
        `spectral_norms([torch.stack([layer.weight for layer in layers])])[0]`
    """
    # Small singular values matter to nobody here: scaled to order one, squares neither under- nor overflow.
    peaks = [_peak(stack) for stack in stacks]
    if sum_ is not None:
        peaks = _summed(peaks, sum_)
    scales = [or_one(peak) for peak in peaks]
    parts = [
        _Bidiagonal(stack / scale[:, None, None], _start(stack))
        for stack, scale in zip(stacks, scales, strict=True)
    ]
    for _ in range(steps):
        products = [part.products() for part in parts]
        if sum_ is not None:
            products = _summed(products, sum_)
        for part, summed in zip(parts, products, strict=True):
            part.extend(summed)
    return [part.norms() * scale.cpu() for part, scale in zip(parts, scales, strict=True)]


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """`matrices @ vectors`, `[count, rows, 1]`, which a CPU takes four to ten times as long for when written so."""
    if matrices.device.type == "cpu" and matrices[:1].numel() > _LARGE:
        pairs = zip(matrices, vectors[..., 0], strict=True)
        return torch.stack([torch.mv(matrix, vector) for matrix, vector in pairs])[..., None]
    return torch.bmm(vectors.mT, matrices.mT).mT


def _peak(stack: Tensor) -> Tensor:
    """The largest absolute entry of each matrix, `[count]`."""
    return stack.abs().amax((1, 2)) if stack.numel() else stack.new_zeros(stack.shape[0])


def _start(stack: Tensor) -> Tensor:
    """A fixed vector of unit length that no structure of weights is likely to be orthogonal to."""
    columns = stack.shape[-1]
    phases = torch.arange(1, columns + 1, dtype=torch.float64) * (math.sqrt(5) - 1) / 2
    # No entry repeats: the golden ratio is far from every fraction.
    vector = 1.0 + (2 * math.pi * phases).sin()
    vector = (vector / vector.norm()).to(stack.device, stack.dtype)
    return vector.repeat(stack.shape[0], 1)[..., None]


def _summed(parts: Sequence[Tensor], sum_: Sum) -> list[Tensor]:
    """Tensors added over processes in one exchange."""
    total = sum_(torch.cat([part.double().flatten() for part in parts]))
    pieces = total.split([part.numel() for part in parts])
    return [piece.reshape(part.shape).to(part.dtype) for piece, part in zip(pieces, parts, strict=True)]
