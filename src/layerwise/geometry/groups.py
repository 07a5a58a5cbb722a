"""From a model to the groups of an optimizer: roles, then the user's splits and overrides, then groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from layerwise.common.checked import checked
from layerwise.common.parameter_names import canonical_name, unwrap
from layerwise.errors import LayerwiseError, warn
from layerwise.geometry.by_shape import check_dtype
from layerwise.geometry.declared import (
    Assigned,
    Overrides,
    Splits,
    matched,
    options_by_name,
    overridden,
    split_layout,
)
from layerwise.geometry.forward import Forward, look
from layerwise.geometry.found import Found
from layerwise.geometry.modules.roles import find_roles
from layerwise.geometry.origin import Origin

#: What a model is where parameters may come in its place.
Model = Annotated[nn.Module, "the model (an nn.Module); for plain parameters use group_by_shape(parameters)"]

_NOTHING = nn.Parameter(torch.empty(0), requires_grad=False)


@dataclass(frozen=True)
class Assignment:
    """What became of the parameters of a model.

    Attributes:
        parameters: those that are trained.
        frozen: by name, what a forward pass showed of the others (without their tensors), should they be trained later.
        overrides: of the user.
        looked: whether a batch or a way to run the model was given.
        said: why a batch that was given could not be used, "" if it was or none was given.
    """

    parameters: list[Assigned]
    frozen: Mapping[str, Found]
    overrides: Overrides | None
    looked: bool
    said: str


@checked
def param_groups(
    model: Model,
    batch: Any = None,
    overrides: Overrides | None = None,
    splits: Splits | None = None,
    forward: Forward | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for a layerwise optimizer: one for each role, layout, geometry and set of overrides.

    Args:
        model: the model, on any device, the meta device too; wrapped, compiled or sharded or not.
        batch: what the model takes (a tensor, a tuple of arguments, a dict of keywords). The model is run on it once, in
            evaluation mode and without gradients, to see what each parameter does; nothing of it changes. A model of
            transformers gets a small batch made for it. Without one, roles come from the modules, and one warning
            counts what is not certain. (A dict without tensors in this place is taken for `overrides`.)
        overrides: glob pattern on the parameter's name (any of its names if tied) -> a geometry, or a dict of
            group options: `geometry`, `role`, `layout`, and those of the optimizer, such as `lr` or `weight_decay`.
            `"role:vector"` stands for all parameters of a role, and patterns on names add to it or win over it. Of a
            list of such dicts the later ones win.
        splits: glob pattern -> how a parameter divides into matrices: `{"q": 512, "k": 128, "v": 128}` (rows of d_out, in
            order), a number of equal parts (1 leaves the parameter whole), a `Split` or its fields in a dict
            (`{"parts": {"q": 1, "k": 1, "v": 1}, "blocks": 12}`), or a pattern of `AxesLayout` such as `"o (4 i)"`, four
            matrices along d_in.
        forward: `forward(model, batch)` runs the model, where a plain call does not.

    Returns:
        Groups `{"params": [(name, parameter), ...], "role": str, "layout": Layout, "geometry": Geometry, **overridden}`, and
        `"origin"`, by which an optimizer sees what is done to the model later.
        Gains, biases, tables of positions and what the model's own `no_weight_decay()` names have `weight_decay` 0 in
        theirs, which stands above an optimizer's, unless an override gives them another.
        Groups and their parameters keep the order of `model.named_parameters()`; names are without the steps that
        wrappers add; frozen and empty parameters are left out.

    Raises:
        LayerwiseError: a pattern that matches nothing, a parameter matched by two patterns, sizes that do not add up,
            and a model without trainable floating-point parameters.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> batch = torch.arange(6)
        >>> groups = lw.param_groups(model, batch, overrides={"1.weight": {"weight_decay": 0.0}})
        >>> [(group["role"], group["params"][0][0]) for group in groups]
        [('embedding', '0.weight'), ('hidden', '1.weight'), ('vector', '1.bias'), ('head', '3.weight')]
        >>> optimizer = lw.Lanton(groups, lr=2e-3)
    """
    everything = assign(model, batch, overrides, splits, forward)
    return grouped(everything, Origin(model, everything.overrides, splits, everything.frozen))


def groups_of(origin: Origin, batch: Any = None) -> list[dict[str, Any]]:
    """Groups as of `param_groups` of what a model is now, with what the user said of it and what was seen then."""
    assert origin.model is not None
    everything = assign(origin.model, batch, origin.overrides, origin.splits, seen=origin.seen)
    return grouped(everything, origin)


def grouped(everything: Assignment, origin: Origin) -> list[dict[str, Any]]:
    """Parameters that share everything, in one group; a warning where something is not certain."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    doubts = sum(bool(assigned.found.note) for assigned in everything.parameters)
    if everything.said:
        warn(everything.said)
    elif doubts and not everything.looked:
        warn(
            f"the roles of {doubts} parameters are not certain: print(layerwise.describe(model)) says which and why; "
            "param_groups(model, batch) finds them by running the model once"
        )
    for assigned in everything.parameters:
        found, geometry, options = assigned.found, assigned.geometry, assigned.options
        key = (found.role, repr(found.layout), repr(geometry), repr(sorted(options.items())))
        kind = {"role": found.role, "layout": found.layout, "geometry": geometry, **options}
        group = groups.setdefault(key, {"params": [], **kind, "origin": origin})
        group["params"].append((found.name, found.parameter))
    return list(groups.values())


def assign(
    model: nn.Module,
    batch: Any = None,
    overrides: Overrides | None = None,
    splits: Splits | None = None,
    forward: Forward | None = None,
    seen: Mapping[str, Found] | None = None,
) -> Assignment:
    """Every trainable parameter with its role, layout, geometry and options; arguments as in `param_groups`.

    Args:
        seen: by name, what an earlier forward pass found of parameters, where this one has nothing to say.
    """
    if overrides is None and _are_overrides(batch):
        batch, overrides = None, batch
    everything, said = _everything(model, batch, forward)
    trainable, left_out = _trainable(model, [_as_seen(found, seen or {}) for found in everything])
    names = [(*found.names, *map(canonical_name, found.names)) for found in trainable]
    frozen = frozen_names(model)
    split_of = matched("splits", splits or {}, names, frozen)
    options_of = options_by_name(overrides or {}, trainable, names, frozen)
    undecayed = _named_undecayed(unwrap(model))
    result = []
    for found in trainable:
        if found.name in split_of:
            found = replace(found, layout=split_layout(found, split_of[found.name]), note="")
        found = replace(found, undecayed=found.undecayed or not undecayed.isdisjoint(found.names))
        result.append(overridden(found, options_of.get(found.name, {})))
    kept = {found.name: replace(found, parameter=_NOTHING) for found in left_out if found.how == "forward"}
    looked = batch is not None or forward is not None
    return Assignment(result, kept, overrides, looked, said if looked else "")


def _as_seen(found: Found, seen: Mapping[str, Found]) -> Found:
    known = seen.get(found.name)
    return found if known is None or found.how == "forward" else replace(known, parameter=found.parameter)


def frozen_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are not trained."""
    return [canonical_name(name) for name, p in unwrap(model).named_parameters() if not p.requires_grad]


def _named_undecayed(model: nn.Module) -> set[str]:
    """What the model itself says is not to be decayed: timm's models have a method for it."""
    named = getattr(model, "no_weight_decay", None)
    return {canonical_name(str(name)) for name in named()} if callable(named) else set()


def _are_overrides(batch: Any) -> bool:
    """Whether a dict stands where overrides stood before there was a batch: a batch holds tensors."""
    return isinstance(batch, Mapping) and not any(isinstance(value, Tensor) for value in batch.values())


def _everything(model: nn.Module, batch: Any, forward: Forward | None) -> tuple[list[Found], str]:
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise LayerwiseError(f"{name} has no shape yet (a lazy module): run the model once on a batch first")
        if getattr(p, "_is_flat_param", False):
            raise LayerwiseError(f"{name} is flattened by FSDP1, its matrices are lost: use FSDP2's fully_shard")
        if p.requires_grad:
            check_dtype(name, p)
    seen = look(model, batch, forward)
    return find_roles(unwrap(model), seen.evidence), seen.said


def _trainable(model: nn.Module, everything: list[Found]) -> tuple[list[Found], list[Found]]:
    """Those that are trained, and the others."""
    if not everything:
        raise LayerwiseError(f"{type(model).__name__} has no parameters: there is nothing to train")
    trainable = [found for found in everything if found.parameter.requires_grad and found.parameter.numel()]
    if not trainable:
        raise LayerwiseError(
            f"all {len(everything)} parameters of {type(model).__name__} are frozen or empty: "
            "set requires_grad=True on those to train"
        )
    return trainable, [found for found in everything if not found.parameter.requires_grad]
