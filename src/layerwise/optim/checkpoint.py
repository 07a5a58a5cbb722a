"""What of an optimizer is saved, and the checks that a saved one meets.

The objects in a group (layout, geometry, noise rule) are saved as text. On loading they must equal the ones the
optimizer was made with: a checkpoint carries the state, the program carries the algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from layerwise.errors import LayerwiseError
from layerwise.optim.options import DESCRIBED

#: Group options that loading leaves as they are.
KEPT: Final = (*DESCRIBED, "update", "norm_group", "role")
_SKIPPED: Final = "skipped_steps"


def to_plain(state_dict: dict[str, Any], skipped: int) -> dict[str, Any]:
    """A torch optimizer state_dict with every group option as a number or text."""
    for group in state_dict["param_groups"]:
        for key in DESCRIBED:
            group[key] = repr(group[key])
        group["lr"] = float(
            group["lr"]
        )  # a float whatever it is while running: every scheduler and tool expects one
    state_dict[_SKIPPED] = skipped
    return state_dict


def without_extras(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state_dict.items() if key != _SKIPPED}


def skipped_steps(state_dict: dict[str, Any]) -> int:
    return int(state_dict.get(_SKIPPED, 0))


def _pairs(optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """(name, parameter, its saved state), by position, as torch matches them."""
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for name, param, index in zip(group["param_names"], group["params"], saved["params"], strict=True):
            yield name, param, state_dict["state"].get(index, {})


def check(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Raise :class:`LayerwiseError` where ``state_dict`` belongs to another model or another optimizer."""
    groups, saved_groups = optimizer.param_groups, state_dict.get("param_groups", [])
    if len(groups) != len(saved_groups):
        raise _other(f"it has {len(saved_groups)} parameter groups, this optimizer {len(groups)}")
    for group, saved in zip(groups, saved_groups, strict=True):
        _check_names(
            group["param_names"], saved.get("param_names"), len(group["params"]), len(saved["params"])
        )
        for key in KEPT:
            live = repr(group[key]) if key in DESCRIBED else group[key]
            if key not in saved or saved[key] != live:
                raise _other(
                    f"{key} of {group['param_names'][0]!r} is {saved.get(key)} in it and {live} here"
                )
    for name, param, state in _pairs(optimizer, state_dict):
        here = optimizer.state[param]
        if here.keys() != state.keys():
            raise _other(f"the state of {name!r} holds {sorted(state)} in it and {sorted(here)} here")
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape != here[key].shape:
                raise _other(
                    f"{key} of {name!r} has shape {tuple(value.shape)} in it and {tuple(here[key].shape)} here"
                )


def _check_names(here: list[str], saved: list[str] | None, count: int, saved_count: int) -> None:
    if count != saved_count:
        raise _other(
            f"a group that starts with {here[0]!r} has {saved_count} parameters in it and {count} here"
        )
    for mine, theirs in zip(here, saved or here, strict=True):
        if mine != theirs:
            raise _other(f"it has the parameter {theirs!r} where this one has {mine!r}")


def _other(difference: str) -> LayerwiseError:
    return LayerwiseError(
        f"this checkpoint is of another model or optimizer: {difference}. "
        "Make the optimizer as it was when the checkpoint was written"
    )


@torch.no_grad()
def restore_precision(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Put back state in the dtype it was saved in: torch casts all of it to the parameter's."""
    for _, param, saved in _pairs(optimizer, state_dict):
        state = optimizer.state[param]
        for key, value in saved.items():
            if isinstance(value, Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(param.device).clone()
