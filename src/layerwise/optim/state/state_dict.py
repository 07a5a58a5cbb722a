"""What of an optimizer is saved, the checks that a saved one meets, and its loading.

Of each parameter its kind of update's state and its rate rule's (`Update.allocate`: momentum, moments, multiplier, ...), of
each group all options, and how many steps were skipped. The objects in a group (layout, geometry, rate rule) are saved as
text. On loading they must equal the ones the optimizer was made with: a checkpoint carries the state, the program carries
the algorithm. Of a model that has since grown or shrunk `strict=False` loads what matches by name and shape.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from layerwise.common.parameter_names import counterparts, first_few, name_to_compare
from layerwise.common.tensors import is_sharded, placed_as
from layerwise.errors import LayerwiseError
from layerwise.optim.groups.complete import Recipe
from layerwise.optim.groups.options import DEFAULTS, DESCRIBED, PARAMETERS
from layerwise.optim.work.job import State

#: Group options that loading leaves as they are, beside those that the kind of update says (`Update.fixed`): what the
#: optimizer is, where the others are how it is set.
KEPT: Final = (*DESCRIBED, "norm_group", "role")
SKIPPED: Final = "skipped_steps"
_UNNAMED: Final = re.compile(r"param_\d+")  # what a parameter is called that came without a name


def to_plain(state_dict: dict[str, Any], skipped: int) -> dict[str, Any]:
    """A torch optimizer state_dict with every group option as a number or text."""
    for group in state_dict["param_groups"]:
        for key in DESCRIBED:
            group[key] = repr(group[key])
        for key, value in group.items():
            # The rate may be a tensor while running, and so what schedulers keep of it; every tool expects a float.
            if isinstance(value, Tensor) and value.numel() == 1:
                group[key] = float(value)
    state_dict[SKIPPED] = skipped
    return state_dict


def in_kind(own: State, saved: State) -> State:
    """``saved`` with every number as a tensor where ``own`` has one of one entry under its key, and the other way.

    Some tools write a tensor of one entry as a plain float.
    """
    return {key: _alike(own.get(key), value) for key, value in saved.items()}


def _alike(mine: Any, theirs: Any) -> Any:
    if is_number(theirs) and isinstance(mine, Tensor) and mine.numel() == 1 and not is_sharded(mine):
        return torch.full(tuple(mine.shape), float(theirs), dtype=mine.dtype)
    if is_number(mine) and isinstance(theirs, Tensor) and theirs.numel() == 1:
        return type(mine)(theirs.item())
    return theirs


def is_number(value: object) -> bool:
    """Whether it is a plain number; a truth is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def same_kind(mine: object, theirs: object) -> bool:
    """Whether one can stand for the other: both tensors, both numbers, or both of one class."""
    if isinstance(mine, Tensor) or isinstance(theirs, Tensor):
        return isinstance(mine, Tensor) and isinstance(theirs, Tensor)
    return (is_number(mine) and is_number(theirs)) or type(mine) is type(theirs)


def with_new_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` in today's words: ``rates`` was ``noise`` once, and ``DualNormAdaptive`` measured at every step."""
    if not isinstance(groups := state_dict.get("param_groups"), list):
        return state_dict
    renamed = [{"rates" if key == "noise" else key: value for key, value in group.items()} for group in groups]
    for group in renamed:
        if isinstance(rule := group.get("rates"), str) and rule.startswith("DualNormAdaptive(") and "every=" not in rule:
            group["rates"] = rule.removesuffix(")") + ", every=1)"
    return {**state_dict, "param_groups": renamed}


def check_is_state(state_dict: object) -> None:
    """Raise :class:`LayerwiseError` for what is no optimizer's state."""
    what = f"is {state_dict!r:.80}"
    if isinstance(state_dict, dict):
        what = f"has the keys {sorted(map(str, state_dict))}"
        if {"state", "param_groups"} <= state_dict.keys():
            return
    raise LayerwiseError(
        f"not the state of an optimizer: it {what}, and 'state' and 'param_groups' are needed; "
        "give what optimizer.state_dict() returned"
    )


def _saved_by_name(state_dict: dict[str, Any]) -> dict[str, tuple[dict[str, Any], int]]:
    """Name -> the group that it is in, and its number among the states."""
    return {
        name: (group, index)
        for group in state_dict["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }


def in_own_order(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` in the order of the optimizer's groups, where names say what belongs where; else as it is.

    Parameters that were unfrozen during a run stand last in it, and in their places in the next one.
    """
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if any("param_names" not in saved for saved in saved_groups):
        return state_dict
    saved, names = _saved_by_name(state_dict), [name for group in groups for name in group["param_names"]]
    same = counterparts(names, list(saved))
    if not len(same) == len(names) == len(saved) or any(map(_UNNAMED.fullmatch, names)):
        return state_dict  # what does not fit is told by the checks
    if [[same[name] for name in group["param_names"]] for group in groups] == [
        group["param_names"] for group in saved_groups
    ]:
        return state_dict
    ordered = []
    for group in groups:
        theirs = [saved[same[name]] for name in group["param_names"]]
        kinds = [_options(other) for other, _ in theirs] or [_options(group)]
        if any(kind != kinds[0] for kind in kinds):
            return state_dict
        ordered.append({**kinds[0], "param_names": list(group["param_names"]), "params": [i for _, i in theirs]})
    return {**state_dict, "param_groups": ordered}


def _kept(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The options of a group that loading leaves as they are."""
    return (*KEPT, *group["update"].fixed)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Of a group, in the form in which it is saved."""
    kept = {key: value for key, value in group.items() if key not in PARAMETERS}
    return {key: repr(value) if key in DESCRIBED and not isinstance(value, str) else value for key, value in kept.items()}


def _check_groups(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        counts = f"it has {len(saved_groups)} parameter groups, this optimizer {len(groups)}"
        raise _other(counts + _names_in_one(groups, saved_groups))
    for group, saved in zip(groups, saved_groups, strict=True):
        if len(group["params"]) != len(saved["params"]):
            first = next(iter(group["param_names"]), "no parameter")
            counts = f"{len(saved['params'])} parameters in it and {len(group['params'])} here"
            raise _other(f"a group that starts with {first!r} has {counts}{_names_in_one(groups, saved_groups)}")
        _check_names(group["param_names"], saved.get("param_names"))
        for key in _kept(group):
            live = repr(group[key]) if key in DESCRIBED else group[key]
            if key not in saved or saved[key] != live:
                first = next(iter(group["param_names"]), "an empty group")
                raise _other(f"{key} of {first!r} is {saved.get(key)} in it and {live} here")
        for key, value in saved.items():
            one = isinstance(value, Tensor) and value.numel() == 1
            if is_number(group.get(key)) and key in DEFAULTS and not (is_number(value) or one):
                raise _other(f"{key} is {value!r:.80} in it and {group[key]} here")


def _check_state(name: str, here: State, saved: State) -> None:
    if not here.keys() <= saved.keys():
        raise _other(f"the state of {name!r} holds {sorted(saved)} in it and {sorted(here)} here")
    for key in here:
        value = saved[key]
        if not same_kind(here[key], value):
            kinds = f"{value!r:.80} in it and a {type(here[key]).__name__} here"
            raise _other(f"{key} of {name!r} is {kinds}")
        if isinstance(value, Tensor) and value.shape != here[key].shape:
            raise _other(f"{key} of {name!r} has shape {tuple(value.shape)} in it and {tuple(here[key].shape)} here")


def _names_in_one(groups: Sequence[dict[str, Any]], saved_groups: Sequence[dict[str, Any]]) -> str:
    """The first few parameters that are in one of two optimizers only."""
    here = {name: None for group in groups for name in group["param_names"]}
    saved = {name: None for group in saved_groups for name in group.get("param_names") or ()}
    if not saved:
        return ""
    same = counterparts(list(here), list(saved))
    sides = {"it lacks": here.keys() - same.keys(), "it alone has": saved.keys() - set(same.values())}
    words = []
    for side, names in sides.items():
        in_order = [name for name in (*here, *saved) if name in names]
        if in_order:
            words.append(f"{side} {first_few(map(repr, in_order))}")
    return "".join(f"; {word}" for word in words)


def _check_names(here: list[str], saved: list[str] | None) -> None:
    """As torch matches them, by position; names of both have to agree, but for what wrappers add."""
    saved = saved or here
    if any(all(map(_UNNAMED.fullmatch, names)) for names in (here, saved)):
        return
    for mine, theirs in zip(here, saved, strict=True):
        if name_to_compare(mine) != name_to_compare(theirs):
            raise _other(f"it has the parameter {theirs!r} where this one has {mine!r}")


def _other(difference: str) -> LayerwiseError:
    return LayerwiseError(
        f"this checkpoint is of another model or optimizer: {difference}. "
        "Make the optimizer as it was when the checkpoint was written, or, for a model that has since changed, take what "
        "fits with load_state_dict(state, strict=False)"
    )


#: Roles whose rows are entries of a vocabulary, so that those in two sizes of it are the same.
WITH_ROWS = ("embedding", "head")
#: State that says what the parameter is like, and not what was seen of it: how many entries a rule's units have.
_OF_THE_PARAMETER = ("size",)


class LoadedState(NamedTuple):
    """What did not fit."""

    missing: list[str]  # parameters of the optimizer that keep the state they had
    unexpected: list[str]  # parameters in the saved state that the optimizer does not have


@torch.no_grad()
def load(optimizer: Optimizer, recipe: Recipe, state_dict: dict[str, Any], strict: bool) -> LoadedState:
    """Load what belongs to an optimizer, of a preset with these options, or raise and change nothing.

    Where it is not ``strict``: the state of every parameter that is in both, and the rates of its group.
    """
    check_is_state(state_dict)
    state_dict = with_new_names(state_dict)
    return (_load_all if strict else _load_what_fits)(optimizer, recipe, state_dict)


def _load_all(optimizer: Optimizer, recipe: Recipe, state_dict: dict[str, Any]) -> LoadedState:
    state_dict = in_own_order(optimizer, state_dict)
    _check_groups(optimizer, state_dict)
    found: list[tuple[Tensor, State, State]] = []
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for name, param, index in zip(group["param_names"], group["params"], saved["params"], strict=True):
            own = optimizer.state[param]
            found.append((param, own, in_kind(own, state_dict["state"].get(index, {}))))
            _check_state(name, own, found[-1][2])
    for param, own, state in found:
        others = {key: state[key] for key in state.keys() - own.keys()}  # of wrappers: schedule-free keeps its z here
        take(own, {key: state[key] for key in own}, rows_are_entries=False)
        for key, value in others.items():
            own[key] = value.detach().clone().to(param.device) if isinstance(value, Tensor) else deepcopy(value)
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        _set_options(group, saved, recipe)
    return LoadedState([], [])


def _load_what_fits(optimizer: Optimizer, recipe: Recipe, state_dict: dict[str, Any]) -> LoadedState:
    if any("param_names" not in group for group in state_dict["param_groups"]):
        raise LayerwiseError(
            "load_state_dict(strict=False) matches parameters by name, and this state holds no names: "
            "load it with strict=True into the optimizer that it was made by"
        )
    saved = _saved_by_name(state_dict)
    same = counterparts([name for group in optimizer.param_groups for name in group["param_names"]], list(saved))
    missing = []
    for group in optimizer.param_groups:
        taken: dict[str, Any] | None = None
        for name, param in zip(group["param_names"], group["params"], strict=True):
            own, (theirs, index) = optimizer.state[param], saved.get(same.get(name, ""), ({}, -1))
            state = in_kind(own, state_dict["state"].get(index, {}))
            if name in same and take(own, state, group["role"] in WITH_ROWS):
                taken = taken or theirs
            else:
                missing.append(name)
        if taken is not None:
            _set_options(group, taken, recipe)
    return LoadedState(missing, [name for name in saved if name not in set(same.values())])


def take(own: State, saved: State, rows_are_entries: bool) -> bool:
    """Copy all of a parameter's state, or nothing where a key or a shape does not fit."""
    if own.keys() != saved.keys():
        return False
    pairs = [(own[key], value) for key, value in saved.items()]
    if not all(_fits(mine, theirs, rows_are_entries) for mine, theirs in pairs):
        return False
    for key, theirs in saved.items():
        mine = own[key]
        if key in _OF_THE_PARAMETER:
            continue
        if not isinstance(mine, Tensor):
            own[key] = theirs
            continue
        own[key], theirs = mine.to(theirs.dtype), placed_as(theirs, mine)
        if mine.shape == theirs.shape:
            own[key].copy_(theirs)
        else:
            rows = min(len(mine), len(theirs))
            own[key][:rows].copy_(theirs[:rows])
    return True


def _fits(mine: Any, theirs: Any, rows_are_entries: bool) -> bool:
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return same_kind(mine, theirs)
    if mine.shape == theirs.shape:
        return True
    same_row = mine.ndim == theirs.ndim == 2 and mine.shape[1] == theirs.shape[1]
    return rows_are_entries and same_row and not is_sharded(mine)


def _set_options(group: dict[str, Any], saved: dict[str, Any], recipe: Recipe) -> None:
    """Rates, decay and what schedulers keep.

    What a checkpoint lacks stays as it is: the user's own keys, what a scheduler noted, and options newer than it.
    """
    taken = {key: value for key, value in saved.items() if key not in (*PARAMETERS, *_kept(group))}
    if "lr_scale" in recipe.get(group["role"], {}):  # in 0.1.0's checkpoints it is inside the rate
        taken.setdefault("lr_scale", 1.0)
    for key in {*group["update"].from_start} - {*taken}:  # they do not begin in mid-run
        group.pop(key, None)
    for key, value in taken.items():
        own = group.get(key)
        group[key] = own.fill_(value) if isinstance(own, Tensor) and own.numel() == 1 else deepcopy(value)
