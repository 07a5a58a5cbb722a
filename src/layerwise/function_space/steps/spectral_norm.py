"""Spectral norms of many matrices at once, estimated from below in a few products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerwise.common.group_by import group_by
from layerwise.common.tensors import or_one, widened

#: What adds a tensor over the processes that hold parts of one matrix, in place.
Sum = Callable[[Tensor], Tensor]
#: Stacks of at most so many columns share one set of vectors, padded with zeros.
_SHORT = 1 << 10
#: Matrices of more entries are multiplied one by one on a CPU: there starting an operation costs nothing beside it.
_LARGE = 1 << 14


@dataclass
class _Lanczos:
    """Lanczos on `A^T A` of several stacks of matrices: `V^T A^T A V = T`, tridiagonal.

    Starting an operation is what small matrices cost, so the vectors of all stacks are worked on together, and the products
    alone go stack by stack. Where rows of the matrices are spread over processes, `right` is everywhere the same.

    Attributes:
        stacks: `[count, rows, columns]` each.
        right: the vectors of all, `[total, most columns]`; zeros where a stack has fewer columns.
        diagonal: of T, `[total]` each.
        above: beside it.
        earlier: the vectors before.
    """

    stacks: list[Tensor]
    right: Tensor
    diagonal: list[Tensor] = field(default_factory=list)
    above: list[Tensor] = field(default_factory=list)
    earlier: Tensor | None = None

    def products(self) -> Tensor:
        """`A^T A` times the vectors, `[total, most columns]`, to be summed over processes."""
        parts = self.right.split([len(stack) for stack in self.stacks])
        return _padded([_squared(stack, part) for stack, part in zip(self.stacks, parts, strict=True)])

    def extend(self, summed: Tensor) -> None:
        """One more row of T, from the sums over processes of `products`."""
        rayleigh = torch.linalg.vecdot(self.right, summed)
        following = torch.addcmul(summed, self.right, rayleigh[:, None], value=-1)
        if self.earlier is not None:
            following.addcmul_(self.earlier, self.above[-1][:, None], value=-1)
        rest = torch.linalg.vector_norm(following, dim=1)
        self.earlier, self.right = self.right, following / or_one(rest)[:, None]
        self.diagonal.append(rayleigh)
        self.above.append(rest)

    def norms(self) -> Tensor:
        """The root of the largest eigenvalue of T, `[total]`, on the CPU: never above the norm, but for rounding."""
        tridiagonal = torch.diag_embed(torch.stack(self.diagonal, -1))
        if len(self.above) > 1:
            # The decomposition reads what is below the diagonal.
            tridiagonal += torch.diag_embed(torch.stack(self.above[:-1], -1), -1)
        # NaN and inf, which the decomposition refuses, are what the norm then is.
        tridiagonal = tridiagonal.cpu()  # so small that a device takes longer, and its user wants numbers
        finite = tridiagonal.isfinite().all(-1).all(-1)
        largest = torch.linalg.eigvalsh(torch.where(finite[:, None, None], tridiagonal, 0.0))[:, -1]
        return torch.where(finite, largest.clamp_min(0).sqrt(), math.nan)


def spectral_norms(stacks: Sequence[Tensor], steps: int = 6, sum_: Sum | None = None) -> list[Tensor]:
    """Estimates of the spectral norms of matrices, from below.

    `steps` steps of Lanczos on `A^T A` from a fixed vector: two products with each matrix a step. Six steps are within a few
    per cent for the updates of training (tests hold them against an SVD), and exact from `min(rows, columns)` steps on.

    Args:
        stacks: matrices of equal shape together, `[count, rows, columns]` each, float32 or float64.
        steps: of Lanczos.
        sum_: where rows of matrices are spread over processes, or whole matrices are on all of them scaled so that their
            squares add up to one matrix's: adds a tensor over processes. All stacks go in one exchange a step.

    Returns:
        For each stack its norms, `[count]`, on the CPU.

    Examples:
        `spectral_norms([torch.stack([layer.weight for layer in layers])])[0]`
    """
    # Small singular values matter to nobody here: scaled to order one, squares neither under- nor overflow.
    peaks = [stack.abs().amax((1, 2)) if stack.numel() else stack.new_zeros(len(stack)) for stack in stacks]
    if sum_ is not None:
        peaks = _summed(peaks, sum_)
    scales = [or_one(peak) for peak in peaks]
    scaled = [stack / scale[:, None, None] for stack, scale in zip(stacks, scales, strict=True)]
    alike = group_by(range(len(scaled)), lambda k: (max(scaled[k].shape[2], _SHORT), scaled[k].dtype, scaled[k].device))
    lots = [[scaled[k] for k in places] for places in alike.values()]
    parts = [_Lanczos(several, _start(several)) for several in lots]
    for _ in range(steps):
        products = [part.products() for part in parts]
        if sum_ is not None:
            products = _summed(products, sum_)
        for part, summed in zip(parts, products, strict=True):
            part.extend(summed)
    found: dict[int, Tensor] = {}
    for places, part in zip(alike.values(), parts, strict=True):
        found |= zip(places, part.norms().split([len(stack) for stack in part.stacks]), strict=True)
    return [found[k] * scale.cpu() for k, scale in enumerate(scales)]


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """`[count, columns]` of each below one another, with zeros up to the most columns."""
    most = max(part.shape[1] for part in parts)
    whole = [torch.nn.functional.pad(p, (0, most - p.shape[1])) if p.shape[1] < most else p for p in parts]
    return whole[0] if len(whole) == 1 else torch.cat(whole)


def _squared(stack: Tensor, vectors: Tensor) -> Tensor:
    """`A^T A` times the vectors `[count, columns]`, which may be padded."""
    left = _times(stack, vectors[:, : stack.shape[2], None])
    # Not `stack.mT @ left`, which a CPU takes 20 times as long for.
    return torch.bmm(left.mT, stack)[:, 0]


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """`matrices @ vectors`, `[count, rows, 1]`, which a CPU takes four to ten times as long for when written so."""
    if matrices.device.type == "cpu" and matrices[:1].numel() > _LARGE:
        pairs = zip(matrices, vectors[..., 0], strict=True)
        return torch.stack([torch.mv(matrix, vector) for matrix, vector in pairs])[..., None]
    return torch.bmm(vectors.mT, matrices.mT).mT


def _start(stacks: Sequence[Tensor]) -> Tensor:
    """Fixed vectors of unit length, that no structure of weights is likely to be orthogonal to; as `_Lanczos.right`."""
    like = stacks[0]
    vectors = {}
    for columns in {stack.shape[2] for stack in stacks}:
        phases = torch.arange(1, columns + 1, dtype=torch.float64, device="cpu") * (math.sqrt(5) - 1) / 2
        # No entry repeats: the golden ratio is far from every fraction.
        vector = 1.0 + (2 * math.pi * phases).sin()
        vectors[columns] = (vector / vector.norm()).to(like.device, like.dtype)
    return _padded([vectors[stack.shape[2]].repeat(len(stack), 1) for stack in stacks])


def _summed(parts: Sequence[Tensor], sum_: Sum) -> list[Tensor]:
    """Tensors added over processes in one exchange."""
    total = sum_(torch.cat([widened(part).flatten() for part in parts]))
    pieces = total.split([part.numel() for part in parts])
    return [piece.reshape(part.shape).to(part.dtype) for piece, part in zip(pieces, parts, strict=True)]
