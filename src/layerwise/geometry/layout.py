"""How a parameter's tensor holds its units (matrices), and the way there and back.

Every layout turns a tensor into stacks ``[k, d_out, d_in]``: `d_out` is the dimension the matrix maps *to*,
whichever way round the module stores it. A `Split` (`split.py`) then divides d_out among the parts of a fused projection.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import ClassVar, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from layerwise.common.checked import checked
from layerwise.errors import LayerwiseError
from layerwise.geometry.split import Split, Stack

Shape = Sequence[int]
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def remember(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Keep the results of a pure function of layouts, shapes and options: they are the same at every step.

    `functools.lru_cache`, which torch.compile would warn of: there the function is computed while it compiles, once.
    """
    known = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def remembered(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return known(*args, **kwargs)  # type: ignore[arg-type]  # of hashable arguments

    return remembered


class Arrangement(NamedTuple):
    """How a tensor is one stack of matrices: divided into ``sizes``, these put in ``order``, and taken as ``stack``."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    back: tuple[int, ...]  # the order of ordered sizes that is that of the tensor
    stack: Stack


@checked
@dataclass(frozen=True)
class Layout(ABC):
    """How a tensor holds units. Frozen; its repr identifies it in checkpoints, its str is for tables.

    Examples:
        >>> layout = lw.TransposedLayout(lw.Split.equal("q", "k", "v"))
        >>> layout.unit_names("c_attn.weight", (4, 12))
        ('c_attn.weight[q]', 'c_attn.weight[k]', 'c_attn.weight[v]')
        >>> [tuple(stack.shape) for stack in layout.to_matrices(torch.zeros(4, 12))]
        [(3, 4, 4)]
    """

    split: Split | None = None
    #: its dimensions, in tables
    stored: ClassVar[str] = ""

    @abstractmethod
    def arrange(self, shape: Shape) -> Arrangement:
        """The way to the stack before any split. Raises LayerwiseError for a shape this layout cannot hold."""

    def stack_shape(self, shape: Shape) -> Stack:
        """(k, d_out, d_in) before any split. Raises LayerwiseError for a shape this layout cannot hold."""
        return self.arrange(shape).stack

    def shapes(self, shape: Shape) -> tuple[Stack, ...]:
        """(k, d_out, d_in) of each stack that `to_matrices` gives for a tensor of this shape."""
        return _shapes(self, tuple(shape))

    def to_matrices(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Stacks ``[k, d_out, d_in]``; parts of one size share a stack. Views where the strides allow it."""
        return self.matrices_of(tensor[None])

    def matrices_of(self, tensors: Tensor) -> tuple[Tensor, ...]:
        """`to_matrices` of each of ``[n, *shape]``, one after the other in stacks ``[n k, d_out, d_in]``."""
        count, *shape = tensors.shape
        sizes, order, _, (k, d_out, d_in) = _arrangement(self, tuple(shape))
        turned = tensors.reshape(count, *sizes).permute(0, *(dim + 1 for dim in order))
        stack = turned.reshape(count * k, d_out, d_in)
        return (stack,) if self.split is None else self.split.divide(stack)

    def from_matrices(self, matrices: Sequence[Tensor], shape: Shape) -> Tensor:
        """The inverse of `to_matrices`: a tensor of `shape`; a view where it can be, not always contiguous."""
        return self.tensors_of(matrices, shape, 1)[0]

    def tensors_of(self, matrices: Sequence[Tensor], shape: Shape, count: int) -> Tensor:
        """The inverse of `matrices_of`: ``[count, *shape]``."""
        sizes, order, back, (k, d_out, d_in) = _arrangement(self, tuple(shape))
        stack = matrices[0] if self.split is None else self.split.join(matrices, (count * k, d_out, d_in))
        divided = stack.reshape(count, *(sizes[dim] for dim in order))
        return divided.permute(0, *(dim + 1 for dim in back)).reshape(count, *shape)

    def unit_names(self, name: str, shape: Shape) -> tuple[str, ...]:
        """One name a unit, in the order of `to_matrices` with its stacks one after the other."""
        k = self.stack_shape(shape)[0]
        labels = [""] if k == 1 else [str(i) for i in range(k)]  # what tells the k matrices apart before the split
        runs = (("",),) if self.split is None else self.split.runs()
        keys = (",".join(filter(None, (label, part))) for run in runs for label in labels for part in run)
        return tuple(f"{name}[{key}]" if key else name for key in keys)

    def count(self, shape: Shape) -> int:
        """Number of units."""
        return sum(k for k, _, _ in self.shapes(shape))

    def _suffix(self) -> str:
        return "" if self.split is None else f" {self.split}"

    def __str__(self) -> str:
        return f"{self.stored}{self._suffix()}"

    def _expect(self, holds: bool, shape: Shape, wanted: str) -> None:
        if not holds:
            raise LayerwiseError(f"{type(self).__name__} holds tensors of shape {wanted}, not {tuple(shape)}")


@remember
def _arrangement(layout: Layout, shape: tuple[int, ...]) -> Arrangement:
    return layout.arrange(shape)


@remember
def _shapes(layout: Layout, shape: tuple[int, ...]) -> tuple[Stack, ...]:
    stack = layout.stack_shape(shape)
    return (stack,) if layout.split is None else layout.split.shapes(stack)


def arranged(factors: Sequence[tuple[str, int]]) -> Arrangement:
    """Of (what it does: "k", "o" or "i", size) of each factor of a tensor's dimensions, slowest first."""
    k, d_out, d_in = [math.prod([size for name, size in factors if name == side]) for side in "koi"]
    order = tuple(dim for side in "koi" for dim, (name, _) in enumerate(factors) if name == side)
    back = tuple(sorted(range(len(order)), key=order.__getitem__))
    return Arrangement(tuple(size for _, size in factors), order, back, (k, d_out, d_in))


@dataclass(frozen=True)
class _ByDimension(Layout):
    """Every dimension does one thing: `axes` has a letter for each, "k", "o" or "i"."""

    axes: ClassVar[str]

    def arrange(self, shape: Shape) -> Arrangement:
        self._expect(len(shape) == len(self.axes), shape, f"[{self.stored.replace(',', ', ')}]")
        return arranged(list(zip(self.axes, shape, strict=True)))


@checked
@dataclass(frozen=True)
class VectorLayout(Layout):
    """d entries in any shape, scalars too, as one ``[d, 1]`` matrix.

    Examples:
        >>> lw.VectorLayout().shapes((8,))
        ((1, 8, 1),)
    """

    stored: ClassVar[str] = "d"

    def arrange(self, shape: Shape) -> Arrangement:
        return arranged([("o", math.prod(shape))])


@checked
@dataclass(frozen=True)
class VectorStackLayout(_ByDimension):
    """``[k, d]``: k vectors, such as the biases of k experts.

    Examples:
        >>> lw.VectorStackLayout().shapes((4, 8))
        ((4, 8, 1),)
    """

    stored: ClassVar[str] = "k,d"
    axes: ClassVar[str] = "ko"


@checked
@dataclass(frozen=True)
class MatrixLayout(_ByDimension):
    """``[out, in]``, as nn.Linear stores its weight.

    Examples:
        >>> lw.MatrixLayout().shapes((16, 8))
        ((1, 16, 8),)
    """

    stored: ClassVar[str] = "out,in"
    axes: ClassVar[str] = "oi"


@checked
@dataclass(frozen=True)
class TransposedLayout(_ByDimension):
    """``[in, out]``: GPT-2's Conv1D, and nn.Embedding, whose ``[V, d]`` maps a one-hot of size V to d.

    Examples:
        >>> lw.TransposedLayout().shapes((8, 16))
        ((1, 16, 8),)
    """

    stored: ClassVar[str] = "in,out"
    axes: ClassVar[str] = "io"


@checked
@dataclass(frozen=True)
class StackLayout(_ByDimension):
    """``[k, out, in]``: experts.

    Examples:
        >>> lw.StackLayout().shapes((4, 16, 8))
        ((4, 16, 8),)
        >>> lw.StackLayout().unit_names("up", (2, 16, 8))
        ('up[0]', 'up[1]')
    """

    stored: ClassVar[str] = "k,out,in"
    axes: ClassVar[str] = "koi"


@checked
@dataclass(frozen=True)
class TransposedStackLayout(StackLayout):
    """``[k, in, out]``: experts that multiply from the right, as gpt-oss and Llama 4 store them.

    Examples:
        >>> lw.TransposedStackLayout().shapes((4, 8, 16))
        ((4, 16, 8),)
    """

    stored: ClassVar[str] = "k,in,out"
    axes: ClassVar[str] = "kio"


@checked
@dataclass(frozen=True)
class ConvLayout(Layout):
    """``[out, in/groups, *kernel]``, any number of axes, as ``[groups, out/groups, in/groups * taps]``.

    Examples:
        >>> lw.ConvLayout().shapes((16, 8, 3, 3))
        ((1, 16, 72),)
    """

    groups: int = 1
    stored: ClassVar[str] = "out,in,*k"

    def arrange(self, shape: Shape) -> Arrangement:
        fits = len(shape) >= 2 and shape[0] % self.groups == 0
        self._expect(fits, shape, f"[out, in/groups, *kernel] with groups={self.groups} dividing out")
        return arranged([("k", self.groups), ("o", shape[0] // self.groups), ("i", math.prod(shape[1:]))])

    def __str__(self) -> str:
        grouped = "" if self.groups == 1 else f" groups={self.groups}"
        return f"{self.stored}{grouped}{self._suffix()}"


@checked
@dataclass(frozen=True)
class ConvTransposeLayout(ConvLayout):
    """``[in, out/groups, *kernel]`` of nn.ConvTranspose, as ``[groups, out/groups, in/groups * taps]``.

    Examples:
        >>> lw.ConvTransposeLayout().shapes((8, 16, 3, 3))
        ((1, 16, 72),)
    """

    stored: ClassVar[str] = "in,out,*k"

    def arrange(self, shape: Shape) -> Arrangement:
        fits = len(shape) >= 2 and shape[0] % self.groups == 0
        self._expect(fits, shape, f"[in, out/groups, *kernel] with groups={self.groups} dividing in")
        taps = math.prod(shape[2:])
        return arranged([("k", self.groups), ("i", shape[0] // self.groups), ("o", shape[1]), ("i", taps)])


@checked
@dataclass(frozen=True)
class DepthwiseLayout(Layout):
    """``[channels, 1, *kernel]``, a filter for each channel, as one ``[channels, taps]`` matrix whose rows are filters.

    Examples:
        >>> lw.DepthwiseLayout().shapes((16, 1, 3, 3))
        ((1, 16, 9),)
    """

    stored: ClassVar[str] = "c,1,*k"

    def arrange(self, shape: Shape) -> Arrangement:
        self._expect(len(shape) >= 2 and shape[1] == 1, shape, "[channels, 1, *kernel]")
        return arranged([("o", shape[0]), ("i", math.prod(shape[2:]))])


def conv_layout(shape: Shape, groups: int, transposed: bool) -> Layout:
    """Of a convolution's weight."""
    if groups == shape[0] > 1 and shape[1] == 1:
        return DepthwiseLayout()
    return (ConvTransposeLayout if transposed else ConvLayout)(groups=groups)
