"""Which weights are output heads, as far as the modules tell without being run.

1. Where a module of the model has `get_output_embeddings()` (transformers) and it gives a module with a weight, that is
   the head.
2. Else every linear projection, outside of the places below, that maps to as many outputs as an embedding has entries,
   while nothing takes as many inputs: the head of a language model, wherever it is registered.
3. Else the last module in registration order that holds a matrix, if it is a linear projection outside of these places:
   - a repeated block: an element of a ModuleList, or one of several siblings of the same structure,
   - one of torch's own Transformer or attention modules,
   - a transformers base model, which ends in hidden states and not in outputs,
   - what makes shifts and scales for other layers ("adaLN", "modulation").
4. Else there is none.

Registration order is the order of assignment in `__init__`. What may be another head, or the head where none was found,
carries a doubt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from layerwise.geometry.module_kinds import is_base_model, is_linear

_TORCH_BLOCKS = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_CONV = nn.modules.conv._ConvNd
_MODULATES = ("adaln", "modulation")


@dataclass(frozen=True)
class Heads:
    """What is known of the heads.

    Attributes:
        weights: ids of the weights that are heads.
        doubts: ids of other weights -> what is not certain about them.
    """

    weights: frozenset[int] = frozenset()
    doubts: dict[int, str] = field(default_factory=dict)


def output_heads(model: nn.Module) -> Heads:
    """The heads by the rules above."""
    declared = declared_head(model)
    if declared is not None:
        return Heads(frozenset({id(declared)}))
    free = {name: module for name, module in _free_modules(model).items() if _holds_matrix(module)}
    unread = {name: m for name, m in free.items() if is_linear(m) and _is_unread(model, _sizes(m)[0])}
    vocabularies = {
        m.num_embeddings for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))
    }
    found = [name for name, module in unread.items() if _sizes(module)[0] in vocabularies]
    if not found:
        found = _last_projection(model, free)
    weights = frozenset(id(free[name].weight) for name in found)
    return Heads(weights, _doubts(model, free, unread, weights))


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


def _last_projection(model: nn.Module, free: dict[str, Any]) -> list[str]:
    names = [
        name
        for name, module in model.named_modules()
        if _holds_matrix(module) and not any(word in name.lower() for word in _MODULATES)
    ]
    return names[-1:] if names and names[-1] in free and is_linear(free[names[-1]]) else []


def _doubts(
    model: nn.Module, free: dict[str, Any], unread: dict[str, Any], heads: frozenset[int]
) -> dict[int, str]:
    """Projections that nothing reads, and a convolution at the end; where there is no head at all, the embeddings too."""
    doubts = {
        id(
            module.weight
        ): "may be an output head: nothing in the model takes as many inputs as it has outputs"
        for module in unread.values()
        if id(module.weight) not in heads
    }
    holders = [module for module in model.modules() if _holds_matrix(module)]
    if heads or not holders:
        return doubts
    last: Any = holders[-1]
    if isinstance(last, _CONV) and any(last is module for module in free.values()) and len(holders) > 1:
        doubts[id(last.weight)] = "may be the output layer: it comes last, and no head was found"
    table: Any = next((m for m in holders if isinstance(m, (nn.Embedding, nn.EmbeddingBag))), None)
    if table is not None and not any(map(is_base_model, model.modules())):
        doubts[id(table.weight)] = "the model has embeddings, and no head was found"
    return doubts


def _free_modules(model: nn.Module) -> dict[str, Any]:
    """Modules outside of repeated blocks, torch's own blocks and base models, where no head is."""
    free = {}
    for name, module in model.named_modules():
        steps = name.split(".") if name else []
        inside = [model.get_submodule(".".join(steps[:depth])) for depth in range(len(steps))]
        # The module itself may be an element (of a list of heads, of a flat Sequential): what counts is where it lies.
        repeated = any(map(_repeats, inside, inside[1:]))
        if not repeated and not any(_is_torch_block(p) or is_base_model(p) for p in inside):
            free[name] = module
    return free


def _sizes(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _is_unread(model: nn.Module, size: int) -> bool:
    """Whether no matrix of the model takes this many inputs."""
    for module in model.modules():
        if is_linear(module) and _sizes(module)[1] == size:
            return False
        if isinstance(module, _CONV) and module.in_channels == size:
            return False
        if isinstance(module, nn.RNNBase) and module.input_size == size:
            return False
        if isinstance(module, nn.MultiheadAttention) and size in (module.embed_dim, module.kdim, module.vdim):
            return False
    return True


def _holds_matrix(module: nn.Module) -> bool:
    return any(p is not None and p.ndim > 1 for p in module._parameters.values())


def _is_torch_block(module: nn.Module) -> bool:
    """One of torch's own blocks, and not a model that was derived from one and has a head of its own."""
    return isinstance(module, _TORCH_BLOCKS) and type(module).__module__.startswith("torch.")


def _repeats(container: nn.Module, element: nn.Module) -> bool:
    if isinstance(container, nn.ModuleList):
        return True
    return Counter(map(_structure, container.children()))[_structure(element)] > 1


def _structure(module: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(remove_duplicate=False))
    return type(module), shapes
