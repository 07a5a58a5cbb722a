"""What every parameter does in its model, found from the modules that own it.

`find_roles(model)` gives one `Found` a parameter tensor: its role, its layout, and a note where they were
assumed from the shape because the owning module is not known. A tensor under several names (tied) is one `Found`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import nn

from layerwise.common.parameter_names import canonical_names
from layerwise.geometry.axes import layout_of, table_layout
from layerwise.geometry.forward import Evidence, judged
from layerwise.geometry.found import Found
from layerwise.geometry.layout import (
    ConvLayout,
    Layout,
    MatrixLayout,
    StackLayout,
    TransposedLayout,
    TransposedStackLayout,
    VectorLayout,
    VectorStackLayout,
    conv_layout,
)
from layerwise.geometry.module_kinds import holds_lora, is_hf_conv1d, is_linear, is_norm, is_torch_norm, lora_factors
from layerwise.geometry.modules.fused import GATE_UP, fused_note, projection_split, recurrent_split
from layerwise.geometry.modules.heads import Heads, output_heads
from layerwise.geometry.split import Split

_EXPERT_COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts")
_ENTRY_BY_ENTRY = ("A_log",)  # the decay rates of Mamba's states: a table of numbers, multiplied with nothing


@dataclass(frozen=True)
class _Place:
    """One place of a tensor in the model, and the way there."""

    name: str
    attribute: str
    parameter: nn.Parameter
    path: tuple[tuple[str, nn.Module], ...]  # (attribute in its parent, module), from the model to the owner

    def found(self, role: str, layout: Layout, kernel: tuple[int, ...] = (), note: str = "") -> Found:
        return Found(self.name, self.parameter, role, layout, kernel, note)

    def assumed(self, role: str, layout: Layout, note: str) -> Found:
        return Found(self.name, self.parameter, role, layout, (), f"assumed {note}", how="assumed")


def find_roles(model: nn.Module, evidence: Evidence | None = None) -> list[Found]:
    """Every parameter of `model`, trainable or not, in the order of `model.named_parameters()`.

    Args:
        model: the model, unwrapped.
        evidence: what a forward pass of it showed, if there was one.
    """
    heads = output_heads(model) if evidence is None else _not_seen(output_heads(model), model, evidence)
    factors = lora_factors(model)
    found: dict[int, Found] = {}
    for place in _places(model):
        key = id(place.parameter)
        this = _classify(place, key in heads.weights, factors.get(key))
        found[key] = _tie(found[key], this) if key in found else this
    for key, doubt in heads.doubts.items():
        if not found[key].note and found[key].layout.split is None:
            found[key] = replace(found[key], note=doubt)
    if evidence is not None:
        numbers = evidence.space.numbers
        found = {key: judged(each, evidence, numbers[each.name]) for key, each in found.items()}
    names = canonical_names(name for each in found.values() for name in each.names)
    return [replace(each, name=names[each.name], tied=tuple(names[name] for name in each.tied)) for each in found.values()]


def _not_seen(heads: Heads, model: nn.Module, evidence: Evidence) -> Heads:
    """What the model declares as its head, and of the rest what the forward pass does not show to be one or none."""
    seen = {id(p) for n, p in enumerate(model.parameters()) if evidence.understood(n)}
    weights = heads.weights if heads.declared else heads.weights - seen
    return Heads(weights, {key: doubt for key, doubt in heads.doubts.items() if key not in seen})


def _places(model: nn.Module) -> Iterator[_Place]:
    for prefix, owner in model.named_modules(remove_duplicate=False):
        path = [("", model)]
        for step in prefix.split(".") if prefix else ():
            path.append((step, getattr(path[-1][1], step)))
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                yield _Place(name, attribute, parameter, tuple(path))


def _tie(first: Found, second: Found) -> Found:
    """One row for two places of a tensor; an embedding here and a projection there make a head."""
    tied = (*first.tied, second.name)
    if first.role == second.role:
        return replace(first, tied=tied)
    by_role = {first.role: first, second.role: second}
    projection = by_role.get("head") or by_role.get("hidden")
    if projection is not None and by_role.keys() <= {"embedding", "head", "hidden"}:
        whole = replace(projection.layout, split=None)
        return replace(projection, name=first.name, tied=tied, role="head", layout=whole)
    return replace(first, tied=tied, note=f"also {second.role} as {second.name}")


def _classify(place: _Place, is_head: bool, factor: str | None) -> Found:
    shape = tuple(place.parameter.shape)
    owner, attribute = _seen_through(place)
    if is_head and len(shape) == 2 and is_norm(owner):  # a projection of normalised rows
        return place.found("head", MatrixLayout())
    # The gain of torch's older `weight_norm`, which makes `weight_g` and `weight_v` of `weight`.
    is_magnitude = attribute.endswith("_g") and f"{attribute[:-2]}_v" in owner._parameters
    if len(shape) <= 1 or is_norm(owner) or is_magnitude:
        wide = sum(size > 1 for size in shape) > 1 and not is_torch_norm(owner)
        note = f"a gain, as the class {type(owner).__name__} is called a normalisation" if wide else ""
        return place.found("vector", VectorLayout(), note=note)
    if factor is not None:
        return _factor(place, owner, factor)
    if _is_beside_the_weight(owner, attribute, place.parameter):
        return _classify_unknown(place, owner, attribute)
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        # A tied weight takes the head's orientation: logits = W x, so d_out is the vocabulary.
        return place.found("head", MatrixLayout()) if is_head else place.found("embedding", TransposedLayout())
    if isinstance(owner, nn.modules.conv._ConvNd):
        note = fused_note(place.path[-2][1], place.path[-1][0], shape[0]) if len(place.path) > 1 else ""
        return place.found("conv", conv_layout(shape, owner.groups, owner.transposed), owner.kernel_size, note)
    if is_linear(owner) and len(shape) == 2:
        return _linear(place, TransposedLayout() if is_hf_conv1d(owner) else MatrixLayout(), is_head)
    if isinstance(owner, nn.MultiheadAttention) and len(shape) == 2:
        split = Split.equal("q", "k", "v") if attribute == "in_proj_weight" else None
        return place.found("hidden", MatrixLayout(split))
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        return place.found("hidden", MatrixLayout(recurrent_split(owner, attribute)))
    if isinstance(owner, nn.Bilinear):
        return place.found("hidden", ConvLayout())
    return _classify_unknown(place, owner, attribute)


def _factor(place: _Place, owner: nn.Module, role: str) -> Found:
    """A factor of a low-rank adapter; peft keeps the adapters of all experts of a layer in one pair of matrices."""
    if isinstance(owner, nn.modules.conv._ConvNd):
        return place.found(role, ConvLayout(), owner.kernel_size)
    if place.parameter.ndim != 2:
        return place.assumed(role, StackLayout(), "a stack of factors stored (k, out, in)")
    experts = next((n for _, m in place.path if isinstance(n := getattr(m, "num_experts", None), int)), 1)
    layer = place.path[-3][1] if len(place.path) > 2 else None  # peft's; loralib's holds its factors itself
    packed = holds_lora(layer) and getattr(layer, "num_experts", 1) == experts
    if experts > 1 and packed:
        return place.found(role, layout_of(f"({experts} o) i" if role == "lora_A" else f"o (i {experts})"))
    return place.found(role, MatrixLayout())


def _linear(place: _Place, stored: Layout, is_head: bool) -> Found:
    if is_head:
        return place.found("head", stored)
    split, note = _projection_split(place, stored.stack_shape(tuple(place.parameter.shape))[1])
    return place.found("hidden", replace(stored, split=split), note=note)


def _is_beside_the_weight(owner: nn.Module, attribute: str, parameter: nn.Parameter) -> bool:
    """Whether a layer of a class derived from one of torch's holds it beside its weight: a gain for each output, say."""
    if isinstance(owner, nn.Linear):
        size = owner.out_features * owner.in_features
    elif isinstance(owner, nn.modules.conv._ConvNd):
        size = owner.out_channels * owner.in_channels // owner.groups * prod(owner.kernel_size)
    else:
        return False
    return attribute != "weight" and parameter.numel() != size


def _classify_unknown(place: _Place, owner: nn.Module, attribute: str) -> Found:
    """A parameter of a module of no known class: experts by their make, the rest by shape, with a note."""
    shape = tuple(place.parameter.shape)
    kind = type(owner).__name__.lower()
    if sum(size > 1 for size in shape) <= 1 or attribute in _ENTRY_BY_ENTRY:
        return place.found("vector", VectorLayout())
    if len(shape) == 3 and _holds_experts(owner, shape[0]):
        return place.found("experts", _expert_layout(owner, attribute, shape))
    if len(shape) == 2 and "bias" in attribute and _holds_experts(owner, shape[0]):
        return place.found("vector", VectorStackLayout())
    if len(shape) == 2 and place.path[-1][0] == "trainable_tokens_delta":  # peft's: rows in the place of a table's
        return place.found("embedding", TransposedLayout())
    if len(shape) == 2 and ("router" in kind or "gate" in kind):  # transformers' routers: linear(x, weight)
        return place.found("hidden", MatrixLayout())
    return _assume(place, attribute)


def _holds_experts(module: nn.Module, count: int) -> bool:
    """Whether the module is a stack of `count` experts: by its own count of them, or by its class's name."""
    own = [getattr(module, attribute, None) for attribute in _EXPERT_COUNTS]
    return count in own or "expert" in type(module).__name__.lower()


def _expert_layout(owner: Any, attribute: str, shape: Sequence[int]) -> Layout:
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


def _assume(place: _Place, attribute: str) -> Found:
    """A parameter that nothing but its name and shape tells of. Always with a note."""
    dimensions = place.parameter.ndim
    if "pos" in attribute or (dimensions == 3 and place.parameter.shape[0] == 1):
        table = place.assumed("embedding", table_layout(dimensions), "a table of learned positions")
        return replace(table, undecayed=True)
    if attribute.endswith("bias"):
        return place.assumed("vector", VectorLayout(), "a bias")
    if dimensions == 2:
        return place.assumed("hidden", MatrixLayout(), "a matrix stored (out, in)")
    if dimensions == 3:
        return place.assumed("experts", StackLayout(), "a stack of matrices stored (k, out, in)")
    return place.assumed("hidden", ConvLayout(), "a matrix stored (out, rest)")


def _seen_through(place: _Place) -> tuple[nn.Module, str]:
    """(owner, attribute), where `conv.parametrizations.weight.original0` counts as `conv.weight`."""
    steps = [step for step, _ in place.path]
    # The magnitudes of weight_norm, one for each output, are a gain of their own and not the weight.
    is_gain = sum(size > 1 for size in place.parameter.shape) <= 1
    if steps[-2:-1] == ["parametrizations"] and place.attribute.startswith("original") and not is_gain:
        return place.path[-3][1], steps[-1]
    return place.path[-1][1], place.attribute


def _projection_split(place: _Place, d_out: int) -> tuple[Split | None, str]:
    """The split of the projection that owns the tensor, and a note if it looks fused but is not known."""
    path = [(step, module) for step, module in place.path if step not in ("base_layer", "parametrizations")]
    if place.path[-2:-1] and place.path[-2][0] == "parametrizations":
        path = path[:-1]
    if len(path) < 2:
        return None, ""
    return projection_split(path[-2][1], path[-1][0], d_out)
