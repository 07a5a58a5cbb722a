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

Registration order is the order of assignment in `__init__`. A projection that nothing reads may be another head, the last
one may be none where something reads it, and where no head was found what comes last may be it: each carries a doubt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from layerwise.geometry.module_kinds import is_base_model, is_linear, lora_factors

_TORCH_BLOCKS = (nn.MultiheadAttention, *(getattr(nn, name) for name in transformer.__all__))
_CONV = nn.modules.conv._ConvNd
_MAY_BE_HEAD = "may be an output head: nothing in the model takes as many inputs as it has outputs"
_LAST_BUT_READ = "taken for the head as it comes last, but other layers take as many inputs as it has outputs"
_LAST_BUT_BARE = "taken for the head as it comes last, but what it lies in holds matrices of its own"
_MAY_BE_LAST = "may be the output layer: it comes last, and no head was found"
_MODULATES = ("adaln", "modulation")


@dataclass(frozen=True)
class Heads:
    """What is known of the heads."""

    weights: frozenset[int] = frozenset()  # ids of the weights that are heads
    doubts: dict[int, str] = field(default_factory=dict)  # ids of other weights -> what is not certain about them
    declared: bool = False  # whether the model itself names its head


def output_heads(model: nn.Module) -> Heads:
    """The heads by the rules above."""
    holders = _holders(model)
    projections = {name: m for name, m in holders.items() if is_linear(m) and not _in_a_list(model, name)}
    taken = _input_sizes(holders)
    unread = {name: m for name, m in projections.items() if _sizes(m)[0] not in taken}
    declared = next((weight for m in model.modules() if (weight := _declared_in(m)) is not None), None)
    if declared is not None:
        weights = frozenset({id(declared)})
        return Heads(weights, _other_heads(unread, weights), declared=True)
    free = {name: m for name, m in projections.items() if _is_free(model, name)}
    vocabularies = {m.num_embeddings for m in holders.values() if _is_table(m)}
    found = [name for name in unread if name in free and _sizes(free[name])[0] in vocabularies]
    last = next((n for n in reversed(holders) if not any(word in n.lower() for word in _MODULATES)), "")
    only_last = not found and last in free
    if only_last:
        found = [last]
    weights = frozenset(id(matrix_of(free[name])) for name in found)
    doubts = _other_heads(unread, weights)
    if only_last:
        bare = [p for m in _around(model, last)[:-1] if (p := matrix_of(m)) is not None and p.ndim == 2]
        read = last not in unread and len(projections) > 1 and not isinstance(model, nn.Sequential)
        if bare or read:
            doubts[id(matrix_of(free[last]))] = _LAST_BUT_BARE if bare else _LAST_BUT_READ
    if not found and holders:
        ends = [holders[last], *list(free.values())[-1:]] if last in holders else []
        doubts = _without_head(model, ends) | doubts
    return Heads(weights, doubts)


def _declared_in(module: Any) -> Tensor | None:
    """The weight that a module itself names as its head, None where it names none."""
    getter = getattr(module, "get_output_embeddings", None)
    if not callable(getter):
        return None
    try:
        head = getter()
        weight = matrix_of(head) if isinstance(head, nn.Linear) else getattr(head, "weight", None)
    except (AttributeError, NotImplementedError):  # what transformers' models without a head do
        return None
    return weight if isinstance(weight, Tensor) else None


def _other_heads(unread: dict[str, Any], heads: frozenset[int]) -> dict[int, str]:
    """Doubts on projections that nothing reads."""
    return {key: _MAY_BE_HEAD for m in unread.values() if (key := id(matrix_of(m))) not in heads}


def _without_head(model: nn.Module, ends: Sequence[nn.Module]) -> dict[int, str]:
    """Doubts on a model in which no head was found: what comes last, and its embeddings.

    A base model of transformers has none, unless it ends in projections of its own, as CLIP does for texts and for images.
    """
    if is_base_model(model):
        own = takewhile(lambda m: is_linear(m) or isinstance(m, nn.Sequential), reversed([*model.children()]))
        return {id(matrix_of(m)): _MAY_BE_LAST for child in own for m in [*_holders(child).values()][-1:]}
    doubts = {id(matrix_of(m)): _MAY_BE_LAST for m in ends if isinstance(m, _CONV) or is_linear(m)}
    for table in [*filter(_is_table, model.modules())][:1]:
        doubts[id(matrix_of(table))] = "the model has embeddings, and no head was found"
    return doubts


def _holders(model: nn.Module) -> dict[str, Any]:
    """All modules with a matrix of their own, but for factors of adapters."""
    factors = lora_factors(model)
    named = {name: m for name, m in model.named_modules() if not isinstance(m, ParametrizationList)}
    return {name: m for name, m in named.items() if (p := matrix_of(m)) is not None and id(p) not in factors}


def matrix_of(module: nn.Module) -> nn.Parameter | None:
    """The largest matrix that a module holds itself, also where a parametrization makes its weight; None without one."""
    weights: Any = module.parametrizations if is_parametrized(module) else {}
    made = [p for name in weights for p in weights[name].parameters(recurse=False)]
    matrices = [p for p in (*module._parameters.values(), *made) if p is not None and p.ndim > 1]
    return max(matrices, key=torch.numel, default=None)


def _in_a_list(model: nn.Module, name: str) -> bool:
    """Whether a module lies in an element of a ModuleList, or in one of torch's own blocks.

    The module itself may be an element (of a list of heads, of a flat Sequential): what counts is where it lies.
    """
    around = _around(model, name)
    # But in no model that was derived from one of torch's, with a head.
    of_torch = any(isinstance(m, _TORCH_BLOCKS) and type(m).__module__.startswith("torch.") for m in around)
    return of_torch or any(isinstance(m, nn.ModuleList) for m in around[:-1])


def _is_free(model: nn.Module, name: str) -> bool:
    """Whether a module lies neither in one of several siblings of one structure nor in a base model."""
    around = _around(model, name)
    return not any(map(_repeats, around, around[1:])) and not any(map(is_base_model, around))


def _around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that a module lies in, from the model on."""
    steps = name.split(".") if name else []
    return [*accumulate(steps, getattr, initial=model)][:-1]


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _sizes(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer; its weight is not made, which changes `spectral_norm`'s buffers."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape
    return columns, rows


def _input_sizes(holders: dict[str, Any]) -> set[int]:
    """How many inputs the layers of a model take, but for the first one, which takes those of the model."""
    sizes: set[int] = set()
    for module in list(holders.values())[1:]:
        if is_linear(module):
            sizes.add(_sizes(module)[1])
        elif isinstance(module, _CONV):
            sizes.add(module.in_channels)
        elif isinstance(module, nn.RNNBase):
            sizes.add(module.input_size)
        elif isinstance(module, nn.MultiheadAttention):
            sizes |= {module.embed_dim, module.kdim, module.vdim}
    return sizes


def _repeats(container: nn.Module, element: nn.Module) -> bool:
    return Counter(map(_structure, container.children()))[_structure(element)] > 1


def _structure(module: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(remove_duplicate=False))
    return type(module), shapes
