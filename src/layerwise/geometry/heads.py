"""Which weight is the model's output head.

1. Where a module of the model has `get_output_embeddings()` (transformers) and it gives a module with a weight,
   that is it.
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

from torch import Tensor, nn

from layerwise.geometry.modules import is_linear

_TORCH_BLOCKS = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def output_head(model: nn.Module) -> Tensor | None:
    """The weight of the output head by the rules above, None where there is none."""
    declared = declared_head(model)
    return _last_projection(model) if declared is None else declared


def declared_head(model: nn.Module) -> Tensor | None:
    """The weight that the model itself names as its head, None where it names none."""
    weights = (_declared_head(module) for module in model.modules())
    return next((weight for weight in weights if weight is not None), None)


def _declared_head(module: Any) -> Tensor | None:
    getter = getattr(module, "get_output_embeddings", None)
    if not callable(getter):
        return None
    try:
        weight = getattr(getter(), "weight", None)
    except (AttributeError, NotImplementedError):  # what transformers' models without a head do
        return None
    return weight if isinstance(weight, Tensor) else None


def _last_projection(model: nn.Module) -> Tensor | None:
    names = [name for name, module in model.named_modules() if _holds_matrix(module)]
    if not names:
        return None
    module: Any = model.get_submodule(names[-1])
    steps = names[-1].split(".")
    inside = [model.get_submodule(".".join(steps[:depth])) for depth in range(len(steps))]
    # The module itself may be an element (of a list of heads, of a flat Sequential): what counts is where it lies.
    excluded = any(map(_repeats, inside, inside[1:])) or any(
        isinstance(parent, _TORCH_BLOCKS) or _is_base_model(parent) for parent in inside
    )
    weight = module.weight if is_linear(module) and not excluded else None
    return weight if isinstance(weight, Tensor) else None


def _holds_matrix(module: nn.Module) -> bool:
    return any(p is not None and p.ndim > 1 for p in module._parameters.values())


def _is_base_model(module: Any) -> bool:
    prefix = getattr(module, "base_model_prefix", None)
    return isinstance(prefix, str) and bool(prefix) and getattr(module, "base_model", None) is module


def _repeats(container: nn.Module, element: nn.Module) -> bool:
    if isinstance(container, nn.ModuleList):
        return True
    return Counter(map(_structure, container.children()))[_structure(element)] > 1


def _structure(module: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(remove_duplicate=False))
    return type(module), shapes
