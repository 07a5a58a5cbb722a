"""Inside `torch.func.vmap`: from the one slice that the model sees to the tensors of all of them, and back.

A product with one weight for all slices is one product, and attention has a fused kernel that `vmap` would call for each
slice. What is used of torch here is private to it; where it fails, slices are run one by one (`graphs`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack


def transforms() -> int:
    """How many of `torch.func`'s transforms are around this call."""
    innermost: Any = _functorch.peek_interpreter_stack()
    return 0 if innermost is None else int(innermost.level())


#: What a model may ask of a tensor's graph.
OF_GRAPHS = {getattr(torch.Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf")}


class SideBySide:
    """The slices of the `vmap` that this is made in.

    Attributes:
        count: how many.
        level: the transforms around the model.
    """

    def __init__(self, count: int) -> None:
        self.count, self.level = count, transforms()

    def together(self, function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        """One slice's part of a function of the `[slices, ...]` that these are one slice's parts of."""
        whole = [None if t is None else _functorch._remove_batch_dim(t, self.level, self.count, 0) for t in tensors]
        with temporarily_pop_interpreter_stack():
            found = function(*whole)
        return _functorch._add_batch_dim(found, 0, self.level)

    def answer(self, getter: Any, tensor: Tensor) -> Any:
        """What a model that asks for `requires_grad` is told outside: `vmap` says False of everything.

        Raises:
            NotImplementedError: for what else it asks of the graph.
        """
        if getter != torch.Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
            raise NotImplementedError("a slice has no graph of its own")
        while _functorch.is_functorch_wrapped_tensor(tensor):
            tensor = _functorch.get_unwrapped(tensor)
        return tensor.requires_grad

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        """`scaled_dot_product_attention`, where it has no mask with slices for further examples."""
        attention: Any = torch.nn.functional.scaled_dot_product_attention
        inner = transforms() != self.level or args or options.get("attn_mask") is not None
        if inner or any(t.ndim != 4 for t in (query, key, value)):
            return attention(query, key, value, *args, **options)

        def each(*whole: Tensor) -> Tensor:
            return attention(*(t.flatten(0, 1) for t in whole), **options).unflatten(0, (self.count, -1))

        return self.together(each, query, key, value)
