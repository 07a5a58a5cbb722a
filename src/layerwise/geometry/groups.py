"""From a model to the groups of an optimizer: roles, the user's splits and overrides, then groups; or by shape alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from layerwise.common.checked import checked
from layerwise.common.parameter_names import canonical_name, counterparts, unwrap
from layerwise.common.similar import nearest
from layerwise.errors import LayerwiseError, warn
from layerwise.geometry.declared import Assigned, Overrides, Splits, matched, options_by_name, overridden, split_layout
from layerwise.geometry.forward import Forward, look
from layerwise.geometry.found import Found, Origin
from layerwise.geometry.layout import ConvLayout, Layout, MatrixLayout, VectorLayout
from layerwise.geometry.modules.roles import find_roles

#: What a model is where parameters may come in its place.
Model = Annotated[nn.Module, "the model (an nn.Module); for plain parameters use group_by_shape(parameters)"]
Factors = Annotated[
    Mapping[str, float] | Sequence[Mapping[str, float]] | None,
    "parameter names -> numbers from 0 on, or a list of such dicts",
]


@checked
def param_groups(
    model: Model,
    batch: Any = None,
    overrides: Overrides | None = None,
    splits: Splits | None = None,
    forward: Forward | None = None,
    factors: Factors = None,
) -> list[dict[str, Any]]:
    """Parameter groups for a layerwise optimizer: one for each role, layout, geometry and set of overrides.

    Args:
        model: the model, on any device, the meta device too; wrapped, compiled or sharded or not.
        batch: what the model takes (a tensor, a tuple of arguments, a dict of keywords), or what a DataLoader yields: of
            `(inputs, targets)` as many as `forward` takes. The model is run on it once, in evaluation mode and without
            gradients, to see what each parameter does; nothing of it changes. A model of transformers gets a small batch
            made for it. Without one, roles come from the modules, and one warning counts what is not certain. (A dict
            without tensors in this place is taken for `overrides`.)
        overrides: glob pattern on the parameter's name (any of its names if tied) -> a geometry, or a dict of
            group options: `geometry`, `role`, `layout`, and those of the optimizer, such as `lr` or `weight_decay`.
            `"role:vector"` stands for all parameters of a role, and patterns on names add to it or win over it. Of a
            list of such dicts the later ones win.
        splits: glob pattern -> how a parameter divides into matrices: `{"q": 512, "k": 128, "v": 128}` (rows of d_out, in
            order), a number of equal parts (1 leaves the parameter whole), a `Split` or its fields in a dict
            (`{"parts": {"q": 1, "k": 1, "v": 1}, "blocks": 12}`), or a pattern of `AxesLayout` such as `"o (4 i)"`, four
            matrices along d_in.
        forward: `forward(model, batch)` runs the model, where a plain call does not.
        factors: name of a parameter -> what its rate is multiplied by, its group's `lr_scale`, of `layer_decay`,
            `width_factors` or your own; of a list of them all. Those that are not named keep theirs.

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
    return groups_of(Origin(model, overrides, splits, factors), batch, forward)


def groups_of(origin: Origin, batch: Any = None, forward: Forward | None = None) -> list[dict[str, Any]]:
    """Groups as of `param_groups` of what a model is now, with what the user said of it and what was seen before.

    Parameters that share everything are in one group. Warns where something is not certain.
    """
    parameters, said = assign(origin, batch, forward)
    doubts = sum(bool(assigned.found.note) for assigned in parameters)
    if said:
        warn(said)
    elif doubts and said is None:
        warn(
            f"the roles of {doubts} parameters are not certain: print(layerwise.describe(model)) says which and why; "
            "given a batch as well, param_groups(model, batch) and add_trainable(model, batch) find them by running it once"
        )
    return _in_groups(parameters, origin=origin)


def _in_groups(parameters: Iterable[Assigned], **shared: Any) -> list[dict[str, Any]]:
    """A group for all parameters of one role, layout, geometry and options; `shared`: keys of every group."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for assigned in parameters:
        found, geometry, options = assigned.found, assigned.geometry, assigned.options
        key = (found.role, repr(found.layout), repr(geometry), repr(sorted(options.items())))
        kind = {"role": found.role, "layout": found.layout, "geometry": geometry, **options, **shared}
        groups.setdefault(key, {"params": [], **kind})["params"].append((found.name, found.parameter))
    return list(groups.values())


def assign(origin: Origin, batch: Any, forward: Forward | None) -> tuple[list[Assigned], str | None]:
    """Every trainable parameter of a model with its role, layout, geometry and options; and what `look` says.

    Of what this forward pass has nothing to say, an earlier one may have (`origin.seen`).
    """
    model = origin.model
    assert model is not None
    # A tokenizer's result is a mapping, and no container that torch's trees look into.
    options_alone = isinstance(batch, Mapping) and not any(isinstance(v, Tensor) for v in tree_leaves(dict(batch)))
    if origin.overrides is None and options_alone:
        batch, origin.overrides = None, batch  # where overrides stood before there was a batch, which holds tensors
    _check_trainable(model)
    evidence, said = look(model, batch, forward)
    everything = [_as_seen(found, origin.seen.get(found.name)) for found in find_roles(model, evidence)]
    trainable = [found for found in everything if found.parameter.requires_grad and found.parameter.numel()]
    names = [(*found.names, *map(canonical_name, found.names)) for found in trainable]
    frozen = frozen_names(model)
    split_of = matched("splits", origin.splits or {}, names, frozen)
    options_of = options_by_name(origin.overrides or {}, trainable, names, frozen)
    named = getattr(model, "no_weight_decay", None)  # timm's models say what is not to be decayed
    undecayed = {canonical_name(str(name)) for name in named()} if callable(named) else set()
    factor_of = _multiplied(origin.factors, everything)
    result = []
    for found in trainable:
        if found.name in split_of:
            found = replace(found, layout=split_layout(found, split_of[found.name]), note="")
        found = replace(found, undecayed=found.undecayed or not undecayed.isdisjoint(found.names))
        options = options_of.get(found.name, {})
        if found.name in factor_of:
            options = {**options, "lr_scale": options.get("lr_scale", 1.0) * factor_of[found.name]}
        result.append(overridden(found, options))
    origin.seen = {found.name: replace(found, parameter=_shape_of(found)) for found in everything if found.how == "forward"}
    return result, said


def _multiplied(factors: Factors, everything: Sequence[Found]) -> dict[str, float]:
    """Name -> the product of its factors, where that is not 1; given by any name of a parameter, as `overrides` are."""
    of_name = {name: found.name for found in everything for name in found.names}
    product = dict.fromkeys(of_name.values(), 1.0)
    for each in [factors] if isinstance(factors, Mapping) else factors or ():
        known = {name: of_name[other] for name, other in counterparts(list(each), list(of_name)).items()}
        times = Counter(known.values())
        for name, factor in each.items():
            if name not in known:
                hint = _hint(name, list(of_name))
                raise LayerwiseError(f"factors: the model has no parameter {name!r} (given {factor:g}): {hint}")
            if not 0 <= factor < math.inf:
                raise LayerwiseError(f"factors: {name!r} has {factor!r}: give a finite number from 0 on")
            if times[known[name]] > 1:
                raise LayerwiseError(
                    f"factors: {name!r} (given {factor:g}) has another name that is given too: name it once"
                )
            product[known[name]] *= factor
    return {name: float(factor) for name, factor in product.items() if factor != 1.0}


def _hint(name: str, names: Sequence[str]) -> str:
    """What to do about a name that there is not."""
    if any(sign in name for sign in "*?["):
        return f"patterns are for overrides, {{{name!r}: {{'lr_scale': ...}}}}"
    near = nearest(name, names)
    return f"did you mean {near[0]!r}?" if near else f"names look like {names[0]!r}"


def _as_seen(found: Found, seen: Found | None) -> Found:
    """What an earlier forward pass found of a parameter of that name and shape, where this one did not see it."""
    if seen is None or found.how == "forward" or seen.parameter.shape != found.parameter.shape:
        return found
    return replace(seen, parameter=found.parameter)


def _shape_of(found: Found) -> nn.Parameter:
    return nn.Parameter(torch.empty(found.parameter.shape, device="meta"), requires_grad=False)


def frozen_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are not trained."""
    return [canonical_name(name) for name, p in unwrap(model).named_parameters() if not p.requires_grad]


def _check_trainable(model: nn.Module) -> None:
    named = list(model.named_parameters())
    for name, p in named:
        if is_lazy(p):
            raise LayerwiseError(f"{name} has no shape yet (a lazy module): run the model once on a batch first")
        if getattr(p, "_is_flat_param", False):
            raise LayerwiseError(f"{name} is flattened by FSDP1, its matrices are lost: use FSDP2's fully_shard")
        if p.requires_grad:
            check_dtype(name, p)
    if not named:
        raise LayerwiseError(f"{type(model).__name__} has no parameters: there is nothing to train")
    if not any(p.requires_grad and p.numel() for _, p in named):
        raise LayerwiseError(
            f"all {len(named)} parameters of {type(model).__name__} are frozen or empty: "
            "set requires_grad=True on those to train"
        )


@checked
def group_by_shape(params: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Groups as of `param_groups` for plain `model.parameters()` or `model.named_parameters()`, by shape alone.

    2-D tensors become hidden matrices, 0-D and 1-D ones vectors (not decayed), all others convolutions; a UserWarning
    says what a shape cannot tell. Parameters without names are called `param_0`, `param_1`, ...

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     groups = lw.group_by_shape(nn.Linear(4, 8).named_parameters())
        >>> [(group["role"], group["params"][0][0]) for group in groups]
        [('hidden', 'weight'), ('vector', 'bias')]
    """
    named = [item if isinstance(item, tuple) else (f"param_{i}", item) for i, item in enumerate(params)]
    if not named:
        raise LayerwiseError("no parameters: give model.parameters() of a model that has some")
    if len({id(p) for _, p in named}) < len(named):
        raise LayerwiseError("a parameter is given twice: give every tensor once")
    warn(
        "parameters are grouped by shape alone, which cannot tell an embedding or an output head from a hidden "
        "matrix, nor (in, out) storage (transformers' Conv1D) from (out, in), nor q, k and v in one weight, nor "
        "experts from a convolution; give layerwise.param_groups(model) instead (to transformers' Trainer: "
        "optimizer_cls_and_kwargs=layerwise.integrations.transformers.trainer_optimizer(...))"
    )
    for name, p in named:
        check_dtype(name, p)
    return _in_groups(overridden(Found(name, p, *_by_shape(tuple(p.shape))), {}) for name, p in named)


def _by_shape(shape: tuple[int, ...]) -> tuple[str, Layout, tuple[int, ...]]:
    if len(shape) <= 1:
        return "vector", VectorLayout(), ()
    if len(shape) == 2:
        return "hidden", MatrixLayout(), ()
    return "conv", ConvLayout(), shape[2:]


def check_dtype(name: str, p: Any) -> None:
    """Raise LayerwiseError for what is no tensor of real floating-point numbers."""
    if not isinstance(p, Tensor):
        raise LayerwiseError(f"{name} is {type(p).__name__} ({p!r:.40}): parameters are tensors or (name, tensor) pairs")
    if p.is_complex():
        raise LayerwiseError(f"{name} is complex ({p.dtype}): train its view_as_real, or freeze it")
    if not p.is_floating_point():
        raise LayerwiseError(f"{name} is of type {p.dtype}: freeze it (requires_grad=False) or make it floating-point")
