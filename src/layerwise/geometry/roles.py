"""What every parameter does in its model, found from the modules that own it.

`find_roles(model)` gives one `Found` a parameter tensor: its role, its layout, and a note where the role was assumed from the
shape because the owning module is not known. A tensor under several names (tied) is one `Found`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from layerwise.geometry.fused import GATE_UP, known_split, looks_fused, recurrent_split
from layerwise.geometry.heads import output_heads
from layerwise.geometry.layout import (
    ConvLayout,
    ConvTransposeLayout,
    Layout,
    MatrixLayout,
    Split,
    StackLayout,
    TransposedLayout,
    TransposedStackLayout,
    VectorLayout,
    VectorStackLayout,
)
from layerwise.geometry.modules import holds_lora, is_hf_conv1d, is_linear, is_norm

ROLES = ("embedding", "head", "hidden", "conv", "experts", "vector", "lora_A", "lora_B")


@dataclass(frozen=True)
class Found:
    """A parameter tensor: `name` is its first name, `tied` the others. `taps`: entries of its convolution kernel."""

    name: str
    parameter: nn.Parameter
    role: str
    layout: Layout
    kernel: tuple[int, ...] = ()
    note: str = ""
    tied: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.tied)


@dataclass(frozen=True)
class _Place:
    """One place of a tensor in the model: the module that registers it, that module's parent, and the path of modules."""

    name: str
    attribute: str
    parameter: nn.Parameter
    owner: nn.Module
    path: tuple[
        tuple[str, nn.Module], ...
    ]  # (attribute in its parent, module), from the model's children to the owner

    @property
    def parent(self) -> tuple[str, nn.Module | None]:
        """(the owner's attribute, the module that has it)."""
        if not self.path:
            return "", None
        return self.path[-1][0], self.path[-2][1] if len(self.path) > 1 else None


def find_roles(model: nn.Module) -> list[Found]:
    """Every parameter of `model`, trainable or not, in the order of `model.named_parameters()`."""
    heads = {id(head) for head in output_heads(model)}
    found: dict[int, Found] = {}
    for place in _places(model):
        this = _classify(place, heads)
        known = found.get(id(place.parameter))
        found[id(place.parameter)] = this if known is None else _tie(known, this)
    return list(found.values())


def _places(model: nn.Module) -> Iterator[_Place]:
    for prefix, owner in model.named_modules(remove_duplicate=False):
        path: list[tuple[str, nn.Module]] = []
        for step in prefix.split(".") if prefix else ():
            path.append((step, (path[-1][1] if path else model).get_submodule(step)))
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                yield _Place(name, attribute, parameter, owner, tuple(path))


def _tie(first: Found, second: Found) -> Found:
    """One row for two places of a tensor. A tensor that is an embedding here and a projection there is a head."""
    tied = (*first.tied, second.name)
    if first.role == second.role:
        return replace(first, tied=tied)
    by_role = {first.role: first, second.role: second}
    projection = by_role.get("head") or by_role.get("hidden")
    if projection is not None and by_role.keys() <= {"embedding", "head", "hidden"}:
        return replace(projection, name=first.name, tied=tied, role="head")
    return replace(first, tied=tied, note=f"also a {second.role} as {second.name}")


def _classify(place: _Place, heads: set[int]) -> Found:
    def found(role: str, layout: Layout, kernel: tuple[int, ...] = (), note: str = "") -> Found:
        return Found(place.name, place.parameter, role, layout, kernel, note)

    shape = tuple(place.parameter.shape)
    owner, attribute = _wrapped(place)
    if len(shape) <= 1 or is_norm(owner):
        return found("vector", VectorLayout())
    lora = _lora_factor(place)
    if lora is not None:
        conv = isinstance(owner, nn.modules.conv._ConvNd)
        return found(lora, ConvLayout() if conv else MatrixLayout(), owner.kernel_size if conv else ())
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        if id(owner) in heads:
            return found("head", MatrixLayout())
        return found("embedding", TransposedLayout())
    if isinstance(owner, nn.modules.conv._ConvNd):
        layout = ConvTransposeLayout if owner.transposed else ConvLayout
        return found("conv", layout(groups=owner.groups), owner.kernel_size)
    if is_linear(owner) and len(shape) == 2:
        stored = TransposedLayout if is_hf_conv1d(owner) else MatrixLayout
        if id(owner) in heads:
            return found("head", stored())
        split, note = _projection_split(place, shape[1 if stored is TransposedLayout else 0])
        return found("hidden", stored(split), note=note)
    if isinstance(owner, nn.MultiheadAttention) and len(shape) == 2:
        return found(
            "hidden", MatrixLayout(Split.equal("q", "k", "v") if attribute == "in_proj_weight" else None)
        )
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        projection = attribute.startswith("weight_hr")
        return found("hidden", MatrixLayout(None if projection else recurrent_split(owner)))
    if isinstance(owner, nn.Bilinear):
        return found("hidden", ConvLayout())
    return _classify_unknown(found_by=place, owner=owner, attribute=attribute, shape=shape)


def _classify_unknown(found_by: _Place, owner: nn.Module, attribute: str, shape: tuple[int, ...]) -> Found:
    """A parameter held directly by a module of no known class: experts by their make, the rest by shape, with a note."""

    def found(role: str, layout: Layout, note: str = "") -> Found:
        return Found(found_by.name, found_by.parameter, role, layout, note=note)

    if sum(size > 1 for size in shape) <= 1:
        return found("vector", VectorLayout())
    kind = type(owner).__name__.lower()
    experts = _expert_count(owner)
    if len(shape) == 3 and (experts == shape[0] or "expert" in kind):
        return found("experts", _expert_layout(owner, attribute, shape))
    if len(shape) == 2 and "bias" in attribute and "expert" in kind:
        return found("vector", VectorStackLayout())
    if len(shape) == 2 and ("router" in kind or "gate" in kind):
        return found("hidden", MatrixLayout())
    if len(shape) == 2:
        return found("hidden", MatrixLayout(), "assumed a matrix stored (out, in)")
    if len(shape) == 3 and shape[0] == 1:
        return found("embedding", TransposedStackLayout(), "assumed a table of learned positions")
    if len(shape) == 3:
        return found("experts", StackLayout(), "assumed a stack of matrices stored (k, out, in)")
    return found("hidden", ConvLayout(), "assumed a matrix stored (out, rest)")


def _wrapped(place: _Place) -> tuple[nn.Module, str]:
    """The owner, seen through torch's parametrizations: `conv.parametrizations.weight.original0` belongs to `conv`."""
    if (
        len(place.path) >= 2
        and place.path[-2][0] == "parametrizations"
        and place.attribute.startswith("original")
    ):
        attribute = place.path[-1][0]
        owner = place.path[-3][1] if len(place.path) >= 3 else None
        # the magnitudes of weight_norm are one per output: a gain of their own, and not the weight
        if owner is not None and sum(size > 1 for size in place.parameter.shape) > 1:
            return owner, attribute
    return place.owner, place.attribute


def _lora_factor(place: _Place) -> str | None:
    """`lora_A` or `lora_B` when the tensor is a factor of a low-rank adapter (also of an adapted embedding)."""
    steps = (*place.path, (place.attribute, None))
    parents = (None, *(module for _, module in place.path))
    for (step, _), parent in zip(steps, parents, strict=True):
        for side in ("A", "B"):
            if step in (f"lora_{side}", f"lora_embedding_{side}") and holds_lora(parent):
                return f"lora_{side}"
    return None


def _projection_split(place: _Place, d_out: int) -> tuple[Split | None, str]:
    attribute, parent = place.parent
    if attribute == "base_layer" and holds_lora(parent) and len(place.path) >= 3:
        attribute, parent = place.path[-2][0], place.path[-3][1]
    split = known_split(parent, attribute)
    if split is not None and d_out % (split.blocks * sum(size for _, size in split.parts)) == 0:
        return split, ""
    if split is None and looks_fused(attribute):
        return None, f"may be several matrices in one; declare them: splits={{{place.name!r}: ...}}"
    return None, ""


def _expert_count(module: nn.Module) -> int | None:
    for attribute in ("num_experts", "n_experts", "num_local_experts", "n_routed_experts"):
        count = getattr(module, attribute, None)
        if isinstance(count, int):
            return count
    return None


def _expert_layout(owner: nn.Module, attribute: str, shape: tuple[int, ...]) -> Layout:
    transposed = getattr(owner, "is_transposed", None)
    if transposed is None:
        transposed = _multiplied_from_the_right(owner)
    layout = TransposedStackLayout if transposed else StackLayout
    if attribute != "gate_up_proj" or shape[2 if transposed else 1] % 2:
        return layout()
    if getattr(owner, "is_concatenated", True):
        return layout(GATE_UP)
    d_out = shape[2 if transposed else 1]
    return layout(Split.equal("gate", "up", blocks=d_out // 2))  # gpt-oss: gate and up row by row


def _multiplied_from_the_right(owner: nn.Module) -> bool:
    """Whether gated experts are stored (k, in, out), from how their two weights chain: [k, h, 2i] then [k, i, h]."""
    up, down = getattr(owner, "gate_up_proj", None), getattr(owner, "down_proj", None)
    if not (isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter) and up.ndim == down.ndim == 3):
        return False
    return up.shape[1] == down.shape[2] and up.shape[2] == 2 * down.shape[1]
