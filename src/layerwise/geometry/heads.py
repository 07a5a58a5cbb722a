"""Which modules are output heads.

1. Where a module of the model has `get_output_embeddings()` (transformers) and it gives a module with a weight, that is it.
2. Else the last module in registration order that holds a matrix, if it is a linear projection and is not part of
   - a repeated block: an element of a ModuleList, or one of several siblings of the same structure,
   - one of torch's own Transformer or attention modules,
   - a transformers base model, which ends in hidden states and not in outputs.
3. Else there is none.

Registration order is the order of assignment in `__init__`; the model is not run.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from layerwise.geometry.modules import is_linear, parents_of

_TORCH_BLOCKS = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The modules whose weight is the output head: none or one by the rules above."""
    declared = _declared_head(model)
    if declared is not None:
        return [declared]
    last = _last_projection(model)
    return [] if last is None else [last]


def _declared_head(model: nn.Module) -> nn.Module | None:
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if not callable(getter):
            continue
        try:
            head = getter()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(head, nn.Module) and getattr(head, "weight", None) is not None:
            return head
    return None


def _last_projection(model: nn.Module) -> nn.Module | None:
    holders = [name for name, module in model.named_modules() if _holds_matrix(module)]
    if not holders:
        return None
    name = holders[-1]
    module = model.get_submodule(name)
    inside = parents_of(model, name)
    if not is_linear(module) or any(
        isinstance(parent, _TORCH_BLOCKS) or _is_base_model(parent) for parent in inside
    ):
        return None
    # the module itself may be an element (a list of heads, a flat Sequential): only what it is inside of counts
    return None if any(map(_is_block, inside, inside[1:])) else module


def _holds_matrix(module: nn.Module) -> bool:
    return any(p is not None and p.ndim > 1 for p in module._parameters.values())


def _is_base_model(module: Any) -> bool:
    prefix = getattr(module, "base_model_prefix", None)
    return isinstance(prefix, str) and bool(prefix) and getattr(module, "base_model", None) is module


def _is_block(container: nn.Module, element: nn.Module) -> bool:
    if isinstance(container, nn.ModuleList):
        return True
    structures = Counter(map(_structure, container.children()))
    return structures[_structure(element)] > 1


def _structure(module: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(remove_duplicate=False))
    return type(module), shapes
