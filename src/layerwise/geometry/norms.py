"""Geometries: what "one step" means for a matrix. Each has a norm, its dual, and the unit step of steepest ascent.

With `<A, B> = sum(A * B)`, every geometry keeps, for each matrix of a stack `[..., d_out, d_in]`,

    lmo(G) = argmax { <G, X> : norm(X) <= 1 },    <G, lmo(G)> = dual_norm(G),    <G, X> <= dual_norm(G) norm(X).

A vector of d entries is a `[d, 1]` matrix. Sources: Bernstein and Newhouse (arXiv 2409.20325) for norms and duals,
Pethick et al. (Scion, arXiv 2502.07529) for the scalings by shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.common.checked import checked
from layerwise.common.tensors import largest_entry
from layerwise.geometry.spectral.lanczos import Seed
from layerwise.geometry.spectral.newton_schulz import check_stack, passes_count, working_dtype


class Geometry(ABC):
    """A norm on stacks of matrices `[..., d_out, d_in]`. Immutable; `repr` identifies it in checkpoints, `str` is short.

    Examples:
        >>> geometry = lw.RowNorm()
        >>> g = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> step = geometry.lmo(g)
        >>> bool(((g * step).sum() - geometry.dual_norm(g)).abs() < 1e-6), round(float(geometry.norm(step)), 6)
        (True, 1.0)
    """

    family: ClassVar[str]

    def __str__(self) -> str:
        usual = type(self)
        changed = [f"{key}={value!r}" for key, value in vars(self).items() if value != getattr(usual, key, None)]
        return f"{usual.__name__}({', '.join(changed)})"

    @property
    def norm_group(self) -> str:
        """Layers of one norm group have comparable dual norms; LANTON compares noise within it."""
        return self.family

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """`[..., d_out, d_in] -> [...]`, in float32 (float64 for float64 input); inf only where the value leaves it."""

    @abstractmethod
    def dual_norm(self, g: Tensor, *, seed: Seed = 0) -> Tensor:
        """`max { <G, X> : norm(X) <= 1 }`, `[..., d_out, d_in] -> [...]`, in float32 (float64 for float64 input).

        `seed` (an int or an integer tensor on the device, e.g. the step number) picks the random probes where the
        value is a stochastic estimate; exact geometries ignore it.
        """

    @abstractmethod
    def lmo(self, g: Tensor) -> Tensor:
        """The unit step of steepest ascent, in the shape and dtype of `g`; zero where `g` is zero."""

    @abstractmethod
    def unit_rms(self, d_out: int, d_in: int) -> float:
        """Root mean square of the entries of a full-rank unit step."""

    @abstractmethod
    def white_noise_dual(self, d_out: int, d_in: int) -> float:
        """How `dual_norm` of white noise of unit deviation grows with the shape, to first order.

        Dividing a measured dual norm by it removes what the shape alone contributes.
        """


@checked
@dataclass(frozen=True)
class Sign(Geometry):
    """Largest entry, `max |x|`; dual `sum |g|`; unit step `sign(g)`.

    `per_input=True` is Scion's l1 -> l_inf form: norm `d_in max |x|`, dual `sum |g| / d_in`, unit step `sign(g) / d_in`.

    Examples:
        >>> g = torch.tensor([[3.0, -0.5]])
        >>> lw.Sign().lmo(g), lw.Sign(per_input=True).lmo(g)
        (tensor([[ 1., -1.]]), tensor([[ 0.5000, -0.5000]]))
    """

    per_input: bool = False
    family: ClassVar[str] = "sign"

    @property
    def norm_group(self) -> str:
        return "sign_per_input" if self.per_input else "sign"

    def norm(self, x: Tensor) -> Tensor:
        check_stack(x)
        return largest_entry(x.to(working_dtype(x)), (-2, -1))[..., 0, 0] * self._scale(x.size(-1))

    def dual_norm(self, g: Tensor, *, seed: Seed = 0) -> Tensor:
        check_stack(g)
        return torch.linalg.vector_norm(g, 1, dim=(-2, -1), dtype=working_dtype(g)) / self._scale(g.size(-1))

    def lmo(self, g: Tensor) -> Tensor:
        check_stack(g)
        return torch.sign(g).div_(self._scale(g.size(-1)))

    def unit_rms(self, d_out: int, d_in: int) -> float:
        return 1.0 / self._scale(d_in)

    def white_noise_dual(self, d_out: int, d_in: int) -> float:
        return math.sqrt(2 / math.pi) * d_out * d_in / self._scale(d_in)

    def _scale(self, d_in: int) -> int:
        return d_in if self.per_input else 1


class _SumOfLengths(Geometry):
    """Norms that take the largest Euclidean length among parts of the matrix (rows, columns, or the whole).

    The dual sums the lengths and the unit step gives every part the same length. `_dims` are the dimensions
    that make up one part; `_length` is the length of each part of a unit step.
    """

    _dims: ClassVar[int | tuple[int, int]]

    @abstractmethod
    def _length(self, d_out: int, d_in: int) -> float: ...

    def norm(self, x: Tensor) -> Tensor:
        largest, lengths, _ = self._lengths(x)
        return (largest * lengths).amax((-2, -1)) / self._length(*x.shape[-2:])

    def dual_norm(self, g: Tensor, *, seed: Seed = 0) -> Tensor:
        check_stack(g)
        if passes_count(g):  # squares of usual numbers stay in range: one pass for four
            plain = torch.linalg.vector_norm(g, dim=self._dims, keepdim=True, dtype=working_dtype(g))
            if ((plain > 1e-12) & (plain < 1e18)).all():
                return plain.sum((-2, -1)) * self._length(*g.shape[-2:])
        largest, lengths, _ = self._lengths(g)
        return (largest * lengths).sum((-2, -1)) * self._length(*g.shape[-2:])

    def lmo(self, g: Tensor) -> Tensor:
        _, lengths, scaled = self._lengths(g)
        return scaled.mul_(self._length(*g.shape[-2:]) / torch.where(lengths > 0, lengths, 1.0)).to(g.dtype)

    def _lengths(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Largest entry of each part, length of the part over it, and the part over it (so that squares stay in range)."""
        check_stack(x)
        x = x.to(working_dtype(x))
        largest = largest_entry(x, self._dims)
        scaled = x / torch.where(largest > 0, largest, 1.0)
        return largest, torch.linalg.vector_norm(scaled, dim=self._dims, keepdim=True), scaled


@dataclass(frozen=True)
class RowNorm(_SumOfLengths):
    """RMS to l_inf operator norm, `sqrt(d_in) max_i ||row_i||`; unit step: every row of length `1 / sqrt(d_in)`.

    Examples:
        >>> lw.RowNorm().lmo(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[0.4243, 0.5657],
                [0.0000, 0.7071]])
    """

    family: ClassVar[str] = "row_norm"
    _dims = -1

    def _length(self, d_out: int, d_in: int) -> float:
        return 1 / math.sqrt(d_in)

    def unit_rms(self, d_out: int, d_in: int) -> float:
        return 1 / d_in

    def white_noise_dual(self, d_out: int, d_in: int) -> float:
        return float(d_out)


@dataclass(frozen=True)
class ColNorm(_SumOfLengths):
    """l1 to RMS operator norm, `max_j ||col_j|| / sqrt(d_out)`; unit step: every column of length `sqrt(d_out)`.

    Examples:
        >>> lw.ColNorm().lmo(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
        tensor([[0.8485, 0.0000],
                [1.1314, 1.4142]])
    """

    family: ClassVar[str] = "col_norm"
    _dims = -2

    def _length(self, d_out: int, d_in: int) -> float:
        return math.sqrt(d_out)

    def unit_rms(self, d_out: int, d_in: int) -> float:
        return 1.0

    def white_noise_dual(self, d_out: int, d_in: int) -> float:
        return float(d_out * d_in)


@dataclass(frozen=True)
class Frobenius(_SumOfLengths):
    """Euclidean length of all entries; its own dual; unit step `g / ||g||`.

    Examples:
        >>> lw.Frobenius().lmo(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        tensor([[0.6000, 0.0000],
                [0.0000, 0.8000]])
    """

    family: ClassVar[str] = "frobenius"
    _dims = (-2, -1)

    def _length(self, d_out: int, d_in: int) -> float:
        return 1.0

    def unit_rms(self, d_out: int, d_in: int) -> float:
        return 1 / math.sqrt(d_out * d_in)

    def white_noise_dual(self, d_out: int, d_in: int) -> float:
        return math.sqrt(d_out * d_in)


@dataclass(frozen=True)
class VectorRMS(_SumOfLengths):
    """Root mean square of the entries, for gains and biases; dual `sqrt(d) ||g||`; unit step `g / RMS(g)`.

    Examples:
        >>> lw.VectorRMS().lmo(torch.tensor([[3.0], [4.0]]))
        tensor([[0.8485],
                [1.1314]])
    """

    family: ClassVar[str] = "vector_rms"
    _dims = (-2, -1)

    def _length(self, d_out: int, d_in: int) -> float:
        return math.sqrt(d_out * d_in)

    def unit_rms(self, d_out: int, d_in: int) -> float:
        return 1.0

    def white_noise_dual(self, d_out: int, d_in: int) -> float:
        return float(d_out * d_in)
