"""The mode that watches a forward pass, operation by operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from layerwise.common.undisturbed import Kept, written
from layerwise.geometry.forward.flow import Flow, Operation, name_of, tensors_in
from layerwise.geometry.forward.rules import follow, other

_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, NotImplementedError)


class Follow(TorchDispatchMode):
    """Runs every operation under it as it is, and then tells a flow what it does to the rows of weights.

    `flex_attention` is one operation. What runs other functions as one (`torch.cond`) is refused: nothing sees into it.

    Args:
        flow: what is told.
        kept: what is to be put back after the pass, told of all that is written.
    """

    supports_higher_order_operators = True

    def __init__(self, flow: Flow, kept: Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flow = flow
        self._kept = kept
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, then say of its results where they come from."""
        kwargs = kwargs or {}
        tensors = tensors_in((*args, *kwargs.values()))
        if isinstance(func, HigherOrderOperator) and "attention" not in func.name():
            raise NotImplementedError(f"{func.name()} runs functions that cannot be followed")
        targets = written(func, args, kwargs)
        self._kept.before_writing(targets)
        on_meta = any(tensor.is_meta for tensor in tensors)
        out = _run_on_meta(func, args, kwargs, targets) if on_meta else func(*args, **kwargs)
        self._count += 1
        results = tensors_in((out,))
        operation = Operation(func, args, kwargs, tensors, results, self._count)
        try:
            if results:
                follow(self._flow, operation)
        except _FAILURES:  # what is not understood must not break the user's forward pass
            other(self._flow, operation)
        return out


def _run_on_meta(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], targets: list[Tensor]) -> Any:
    """The operation with all its tensors on the meta device; what it writes into stays where it is, as it was."""
    moved, named = tree_map_only(
        Tensor, lambda tensor: tensor if tensor.is_meta else tensor.to("meta"), (args, dict(kwargs))
    )
    if "device" in named:
        named["device"] = torch.device("meta")
    if name_of(func) == "_grouped_mm":  # which on this device is there for bfloat16 alone
        halves = tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, moved)
        return func(*halves, **named).to(args[0].dtype)
    out = func(*moved, **named)
    if not targets or len(targets) != len(func._schema.returns):
        return out
    return targets[0] if len(targets) == 1 else tuple(targets)
