"""From what a user gives to complete parameter groups: names, a preset's options, and every check."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

from layerwise.errors import LayerwiseError, warn
from layerwise.geometry import VectorLayout, VectorRMS, group_by_shape
from layerwise.geometry.declared import default_geometry
from layerwise.geometry.found import MATRIX_ROLES, ROLES
from layerwise.optim.groups.options import (
    DEFAULTS,
    OPTIONAL,
    PARAMETERS,
    check_group,
    check_option,
    check_options,
    check_parameter,
)
from layerwise.optim.updates import UPDATES, Lmo, Update
from layerwise.optim.work.job import Group

#: Options by role; "default" is for every role that is not named.
Recipe = Mapping[str, Mapping[str, Any]]
#: Roles whose geometry goes by the role alone.
_PLAIN_ROLES: Final = {*ROLES} - {*MATRIX_ROLES}
_NO_OPTIONS = (*PARAMETERS, "origin")


def matrices_and_the_rest(matrices: Mapping[str, Any], rest: Mapping[str, Any]) -> Recipe:
    """Unit steps with the options ``matrices`` for :data:`MATRIX_ROLES`, AdamW with ``rest`` for all other roles."""
    for key, value in rest.items():
        check_option(key, value, called=f"adamw_{key}")
    return dict.fromkeys(MATRIX_ROLES, matrices) | {"default": {"update": "adamw", **rest}}


def as_groups(params: Iterable[Any]) -> list[Group]:
    """Groups as they were given; plain parameters, named or not, by their shapes (with one warning)."""
    if isinstance(params, Tensor):
        raise LayerwiseError("params is a single tensor: pass layerwise.param_groups(model) or a list of parameters")
    if isinstance(params, nn.Module) or not isinstance(params, Iterable):
        raise LayerwiseError(
            f"params is of type {type(params).__name__}: pass layerwise.param_groups(model) or a list of parameters"
        )
    given = list(params)
    dicts = [item for item in given if isinstance(item, dict)]
    if dicts and len(dicts) < len(given):
        raise LayerwiseError("params mixes groups with parameters: pass groups (dicts) alone, or parameters alone")
    # Parameters may be a generator, as model.parameters() is.
    dicts = [{**group, "params": _as_list(group["params"])} if "params" in group else group for group in dicts]
    groups: list[Group] = dicts if dicts or not given else [{"params": given}]
    if not groups:
        raise LayerwiseError("the optimizer got no parameters: pass layerwise.param_groups(model), or check requires_grad")
    if not any(group.get("params", True) for group in groups):  # torch takes them
        warn("all groups are empty: nothing is trained until parameters are added; check requires_grad")
    return groups


def with_layouts(group: Group, named: int) -> list[Group]:
    """The group itself, its parameters named, or where it has no layout the groups that its shapes make of it.

    ``named`` is how many parameters the optimizer has already: those without a name are counted on from it.
    """
    if "params" not in group:
        raise LayerwiseError(f"a parameter group has no 'params' (its keys: {', '.join(map(repr, group))}): add them")
    params = name_params(_as_list(group["params"]), group.get("param_names"), named)
    options = {key: value for key, value in group.items() if key not in _NO_OPTIONS}
    if options.get("layout") is not None:
        return [{"params": params, **options}]
    return _by_shape(params, {key: value for key, value in options.items() if value is not None})


def _by_shape(params: list[tuple[str, Tensor]], options: Group) -> list[Group]:
    check_group(options)
    check_parameters(params, (), ())
    if not params:  # the no_decay of a model without biases: as if it held some
        return [{"params": [], "role": "vector", "layout": VectorLayout(), "geometry": VectorRMS(), **options}]
    return [found | options for found in group_by_shape(params)]


def complete(group: Group, recipe: Recipe, defaults: Mapping[str, Any]) -> Group:
    """The group with every option set: its own, else the preset's for its role, else the default."""
    try:
        return _complete(group, recipe, defaults)
    except LayerwiseError as error:
        raise LayerwiseError(f"{_first_name(group)}: {error}") from None


def _complete(group: Group, recipe: Recipe, defaults: Mapping[str, Any]) -> Group:
    check_group(group)
    preset = recipe.get(str(group.get("role")), recipe.get("default", {}))
    check_options(preset)
    base = {key: defaults[key] for key in (*DEFAULTS, *OPTIONAL) if key in defaults}
    # A geometry in a preset is its definition (Signum's): it stands above the one param_groups found.
    full = {**base, **preset, **group, **{key: preset[key] for key in ("geometry",) if key in preset}}
    if "lr_scale" in preset:  # it is of the optimizer's rate: a rate of the group's own is all of it
        full["lr_scale"] = group.get("lr_scale", 1.0) * (1.0 if "lr" in group else preset["lr_scale"])
    if full["layout"] is None or full["geometry"] is None:
        raise LayerwiseError(
            f"a parameter group has layout={full['layout']!r} and geometry={full['geometry']!r}: "
            "give both, as layerwise.param_groups(model) does, or neither"
        )
    check_group(full)
    kind = full["update"]
    update: Update = UPDATES[kind] if isinstance(kind, str) else kind
    full["update"] = update
    role = group.get("role")  # a group always has a geometry: was it asked for?
    plain = default_geometry(role, layout=full["layout"]) if role in _PLAIN_ROLES else full["geometry"]
    without = {**base, **preset, "geometry": plain}
    for key in update.unused:
        if key in group and group[key] != without[key]:
            hint = "" if key in Lmo.unused else '; give "update": "lmo" as well for steps in its geometry'
            warn(f"{key}={group[key]!r} of {_first_name(group)} has no effect: {update!r} updates it{hint}")
    if (rule := update.rule(full)) is not None:
        rule.fits(full)
        if rule.every > 1:
            full.setdefault("rate_steps", 0)
    if full.get("momentum_warmup"):
        full.setdefault("momentum_steps", 0)
    if full.get("rounding") == "stochastic":
        full.setdefault("rounding_seed", 0)
    full["norm_group"] = full["norm_group"] or full["geometry"].norm_group
    return {key: _plain(value) for key, value in full.items()}


def for_torch(group: Group, others: Iterable[Group]) -> Group:
    """A complete group as torch's ``add_param_group`` takes it, beside the ``others`` that are there."""
    names: Group = {} if group["params"] else {"param_names": []}  # torch makes none, and then misses them
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.clone()  # a scheduler that writes into a shared one in place would move it once a group
    if any("initial_lr" in other for other in others):  # a schedule runs; one made anew needs it of every group
        group = {"initial_lr": float(lr), **group}
    return {**group, **names, "lr": lr}


def check_rules(groups: Sequence[Group]) -> None:
    """Let every rate rule see the names of the units that it rules, and of the others."""
    units = [
        (unit, group["update"].rule(group))
        for group in groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
        for unit in group["update"].unit_names(group, name, param)
    ]
    for group in groups:
        if (rule := group["update"].rule(group)) is not None:
            ruled = [unit for unit, other in units if other == rule]
            rule.check(ruled, [unit for unit, other in units if other != rule])


def _first_name(group: Group) -> str:
    """Which group an error is about."""
    names = [name for name, _ in group["params"]]
    return f"the group of {names[0]!r}" if names else "an empty group"


def _plain(value: Any) -> Any:
    """A NumPy number as Python's own, a config's list as a list: a state_dict would not load with ``weights_only``."""
    if isinstance(value, (bool, int, str, list, tuple)):
        return value
    if isinstance(value, Sequence):
        return list(value)
    return float(value) if isinstance(value, numbers.Real) else value


def check_parameters(params: list[tuple[str, Tensor]], known: Collection[Tensor], known_names: Collection[str]) -> None:
    """Raise :class:`LayerwiseError` for a parameter that cannot be optimized, or is there twice."""
    names, seen = set(known_names), {id(p) for p in known}
    for name, param in params:
        check_parameter(name, param)
        if id(param) in seen:
            raise LayerwiseError(
                f"parameter {name!r} is given twice: every tensor belongs to one group, once (what has been unfrozen in a "
                "model is added by optimizer.add_trainable(model))"
            )
        if name in names:
            raise LayerwiseError(
                f"two parameters are named {name!r}: give each a name of its own, as models in one nn.ModuleList have"
            )
        names.add(name)
        seen.add(id(param))


def name_params(given: list[Any], names: list[str] | None, first: int) -> list[tuple[str, Tensor]]:
    """``(name, parameter)`` pairs of parameters that come in pairs, beside a list of names, or without names."""
    if names is not None and len(names) == len(given) and not any(isinstance(item, tuple) for item in given):
        return list(zip(names, given, strict=True))
    return [item if isinstance(item, tuple) else (f"param_{first + i}", item) for i, item in enumerate(given)]


def _as_list(params: Any) -> list[Any]:
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, (set, frozenset)):
        raise LayerwiseError("the parameters of a group are a set, whose order is not the same in every run: give a list")
    return list(params)
