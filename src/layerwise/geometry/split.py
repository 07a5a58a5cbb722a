"""How the rows of a matrix are divided among the parts of a fused projection, and put together again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, cat, split, unflatten

from layerwise.common.checked import checked
from layerwise.errors import LayerwiseError

#: (k, d_out, d_in) of a stack of matrices.
Stack = tuple[int, int, int]


@checked
@dataclass(frozen=True)
class Split:
    """Named parts of d_out, in order, with sizes relative to one another.

    The pattern of parts is repeated `blocks` times along d_out: 1 for ``[all q | all k | all v]``, the number
    of heads for the interleaved ``[q1 k1 v1 | q2 k2 v2 | ...]``. Sizes are relative, so that layers of different
    width have the same split: q, k, v of 512, 128, 128 rows are `(("q", 4), ("k", 1), ("v", 1))`.

    Examples:
        >>> split = lw.Split.of_sizes({"q": 512, "k": 128, "v": 128})
        >>> print(split)
        q:4|k:1|v:1
        >>> split.rows(768)
        (512, 128, 128)
        >>> print(lw.Split.equal("q", "k", "v", blocks=12))
        (q|k|v) x 12
    """

    parts: tuple[tuple[str, int], ...]
    blocks: int = 1

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parts]
        if len(names) < 2 or len(set(names)) < len(names):
            raise LayerwiseError(f"a split needs at least two parts of different names, got {names}")
        for name, size in self.parts:
            if size < 1:
                raise LayerwiseError(f"part {name!r} of a split has size {size}; give a positive number of rows")
        if self.blocks < 1:
            raise LayerwiseError(f"a split has blocks={self.blocks}; give 1 or more")

    @classmethod
    def equal(cls, *names: str, blocks: int = 1) -> Split:
        """Parts of one size."""
        return cls(tuple((name, 1) for name in names), blocks)

    @classmethod
    def of_sizes(cls, sizes: Mapping[str, int], blocks: int = 1) -> Split:
        """Parts of the given numbers of rows, reduced to their smallest whole ratio."""
        if not all(isinstance(size, int) for size in sizes.values()):
            raise LayerwiseError(f"a split has sizes {dict(sizes)}; give whole numbers of rows")
        common = math.gcd(*sizes.values()) or 1
        return cls(tuple((name, size // common) for name, size in sizes.items()), blocks)

    def rows(self, d_out: int) -> tuple[int, ...]:
        """Number of rows of each part. Raises LayerwiseError when the parts do not fill d_out exactly."""
        total = self._total()
        if not self.divides(d_out):
            raise LayerwiseError(f"d_out = {d_out} cannot be divided as {self}: it is no multiple of {total}")
        return tuple(self.blocks * size * (d_out // total) for _, size in self.parts)

    def divides(self, d_out: int) -> bool:
        """Whether the parts can fill d_out rows exactly."""
        return d_out % self._total() == 0

    def _total(self) -> int:
        return self.blocks * sum(size for _, size in self.parts)

    def runs(self) -> tuple[tuple[str, ...], ...]:
        """Names of neighbouring parts of one size: each run shares a stack."""
        return tuple(tuple(name for name, _ in run) for _, run in groupby(self.parts, key=lambda part: part[1]))

    def shapes(self, stack: Stack) -> tuple[Stack, ...]:
        k, d_out, d_in = stack
        rows = dict(zip((name for name, _ in self.parts), self.rows(d_out), strict=True))
        return tuple((k * len(run), rows[run[0]], d_in) for run in self.runs())

    def divide(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[k, d_out, d_in]`` to a stack ``[k * parts, rows, d_in]`` a run; views where strides allow."""
        _, d_out, d_in = x.shape  # of no matrix too
        per_block = [parts * rows // self.blocks for parts, rows, _ in self.shapes((1, d_out, d_in))]
        pieces = split(unflatten(x, 1, (self.blocks, d_out // self.blocks)), per_block, dim=2)
        return tuple(
            unflatten(piece, 2, (len(run), -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
            for piece, run in zip(pieces, self.runs(), strict=True)
        )

    def join(self, stacks: Sequence[Tensor], stack: Stack) -> Tensor:
        """The inverse of `divide`: stacks of the runs back to ``[k, d_out, d_in]``."""
        k, _, _ = stack
        pieces = [
            unflatten(unflatten(x, 0, (k, len(run))), 2, (self.blocks, -1)).transpose(1, 2).flatten(2, 3)
            for x, run in zip(stacks, self.runs(), strict=True)
        ]
        joined = pieces[0] if len(pieces) == 1 else cat(pieces, dim=2)
        return joined.flatten(1, 2)

    def __str__(self) -> str:
        even = len(self.runs()) == 1
        pattern = "|".join(name if even else f"{name}:{size}" for name, size in self.parts)
        return pattern if self.blocks == 1 else f"({pattern}) x {self.blocks}"
