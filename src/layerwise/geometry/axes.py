"""Layouts in words: which dimension of a tensor maps out, which in, and which counts matrices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from layerwise.common.checked import checked
from layerwise.errors import LayerwiseError
from layerwise.geometry.layout import (
    Arrangement,
    Layout,
    MatrixLayout,
    Shape,
    StackLayout,
    TransposedLayout,
    TransposedStackLayout,
    VectorLayout,
    arranged,
)
from layerwise.geometry.split import Split  # noqa: F401 (the type of a field that AxesLayout has from Layout)

_WORD = re.compile(r"\(([^()]*)\)|([^\s()]+)")
_KNOWN = {" ".join(kind.axes): kind for kind in (MatrixLayout, TransposedLayout, StackLayout, TransposedStackLayout)}


@checked
@dataclass(frozen=True)
class AxesLayout(Layout):
    """Any arrangement of matrices, written as a word for each dimension of the tensor.

    `o` maps out, `i` in, and `k` counts matrices. A dimension in brackets is divided, the slowest factor first; there a
    number stands for so many matrices:

    Attributes:
        pattern: the words, such as

            - `"o (4 i)"`: `[out, 4 * in]`, four matrices side by side, as an attention's output projection holds its heads;
            - `"o (i 4)"`: the same, column by column in turn, as peft's `lora_B` holds the adapters of experts;
            - `"(8 o) i"`: `[8 * out, in]`, eight experts in one matrix;
            - `"k k o i"`: `[layers, 2, out, in]`, a bank of weights.

    Examples:
        >>> lw.AxesLayout(pattern="o (4 i)").shapes((32, 64))
        ((4, 32, 16),)
    """

    pattern: str = "o i"

    def __post_init__(self) -> None:
        words = [name for names in self._words() for name in names]
        once = all(sum(not name.isdigit() for name in names) == 1 for names in self._words())
        known = all(word in ("o", "i", "k") or (word.isdigit() and int(word) > 0) for word in words)
        if not once or not known or not {"o", "i"} <= set(words):
            raise LayerwiseError(
                f"AxesLayout(pattern={self.pattern!r}): give one of o, i, k for each dimension, o and i at least once, "
                'with numbers of matrices in brackets, such as "o (4 i)"'
            )

    def arrange(self, shape: Shape) -> Arrangement:
        words = self._words()
        self._expect(len(words) == len(shape), shape, f"({self.pattern})")
        factors = []
        for names, size in zip(words, shape, strict=True):
            known = prod(int(name) for name in names if name.isdigit())
            self._expect(size % max(known, 1) == 0, shape, f"({self.pattern})")
            factors += [("k", int(name)) if name.isdigit() else (name, size // max(known, 1)) for name in names]
        return arranged(factors)

    def _words(self) -> list[list[str]]:
        return [(inside or bare).split() for inside, bare in _WORD.findall(self.pattern)]

    def __str__(self) -> str:
        return f"{self.pattern}{self._suffix()}"


def layout_of(pattern: str) -> Layout:
    """The layout of a pattern of `AxesLayout`: one of the well-known four where it is one of them.

    Raises:
        LayerwiseError: a pattern that says nothing, or not enough.
    """
    known = _KNOWN.get(" ".join(pattern.split()))
    return known() if known is not None else AxesLayout(pattern=pattern)


def table_layout(dimensions: int) -> Layout:
    """Of learned vectors along the last dimension; one of more than three dimensions is one table, whatever numbers it."""
    if dimensions == 1:
        return VectorLayout()
    return layout_of("k i o" if dimensions == 3 else " ".join([*(dimensions - 1) * "i", "o"]))
