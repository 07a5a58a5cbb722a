"""Stacks of experts in one parameter: `[k, out, in]`, or `[k, in, out]` where they multiply from the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from layerwise.geometry.layout import Layout, StackLayout, TransposedStackLayout
from layerwise.geometry.modules.fused import GATE_UP
from layerwise.geometry.split import Split

_COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts")


def holds_experts(module: nn.Module, count: int) -> bool:
    """Whether the module is a stack of `count` experts: by its own count of them, or by its class's name."""
    own = [getattr(module, attribute, None) for attribute in _COUNTS]
    return count in own or "expert" in type(module).__name__.lower()


def expert_layout(owner: Any, attribute: str, shape: Sequence[int]) -> Layout:
    """The layout of `owner.attribute`, as transformers' classes say it: `is_transposed`, `is_concatenated`."""
    transposed = getattr(owner, "is_transposed", None)
    if transposed is None:
        transposed = _multiplied_from_the_right(owner)
    make = TransposedStackLayout if transposed else StackLayout
    d_out = make().stack_shape(shape)[1]
    if attribute != "gate_up_proj" or d_out % 2:
        return make()
    if getattr(owner, "is_concatenated", True):
        return make(GATE_UP)
    return make(Split.equal("gate", "up", blocks=d_out // 2))  # gpt-oss: row by row, gate, up, gate, up, ...


def _multiplied_from_the_right(owner: Any) -> bool:
    """Whether gated experts are stored (k, in, out), from how their weights chain: [k, h, 2i], then [k, i, h]."""
    up, down = getattr(owner, "gate_up_proj", None), getattr(owner, "down_proj", None)
    if not (isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter) and up.ndim == down.ndim == 3):
        return False
    return up.shape[1] == down.shape[2] and up.shape[2] == 2 * down.shape[1]
