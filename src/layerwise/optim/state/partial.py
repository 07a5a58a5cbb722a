"""Loading the state of a model that has since grown or shrunk: what matches by name and shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from layerwise.common.parameter_names import counterparts
from layerwise.common.tensors import is_sharded, placed_as
from layerwise.errors import LayerwiseError
from layerwise.optim.state.state_dict import KEPT, check_keys, in_kind, same_kind
from layerwise.optim.work.job import State

#: Roles whose rows are entries of a vocabulary, so that those in two sizes of it are the same.
WITH_ROWS = ("embedding", "head")
#: State that says what the parameter is like, and not what was seen of it: how many entries a rule's units have.
_OF_THE_PARAMETER = ("size",)


class LoadedState(NamedTuple):
    """What did not fit."""

    missing: list[str]  # parameters of the optimizer that keep the state they had
    unexpected: list[str]  # parameters in the saved state that the optimizer does not have


@torch.no_grad()
def take_what_fits(optimizer: Optimizer, state_dict: dict[str, Any]) -> LoadedState:
    """Copy the state of every parameter that is in both, and the rates of its group."""
    check_keys(state_dict)
    saved: dict[str, tuple[dict[str, Any], State]] = {}
    for group in state_dict["param_groups"]:
        if "param_names" not in group:
            raise LayerwiseError(
                "load_state_dict(strict=False) matches parameters by name, and this state holds no names: "
                "load it with strict=True into the optimizer that it was made by"
            )
        for name, index in zip(group["param_names"], group["params"], strict=True):
            saved[name] = group, state_dict["state"].get(index, {})
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    same = counterparts(names, list(saved))
    missing, seen = [], set()
    for group in optimizer.param_groups:
        taken: dict[str, Any] | None = None
        for name, param in zip(group["param_names"], group["params"], strict=True):
            seen.add(same.get(name))
            theirs, state = saved.get(same.get(name, ""), ({}, {}))
            state = in_kind(optimizer.state[param], state)
            if name in same and take(optimizer.state[param], state, group["role"] in WITH_ROWS):
                taken = taken or theirs
            else:
                missing.append(name)
        if taken is not None:
            _set_options(group, taken)
    return LoadedState(missing, [name for name in saved if name not in seen])


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


def _set_options(group: dict[str, Any], saved: dict[str, Any]) -> None:
    """Rates, decay and what schedulers keep, as in a strict load."""
    for key, value in saved.items():
        if key in ("params", "param_names", *KEPT):
            continue
        lr = group.get(key)
        group[key] = lr.fill_(value) if isinstance(lr, Tensor) else value
