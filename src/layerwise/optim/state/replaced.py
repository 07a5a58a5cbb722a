"""State for tensors that a framework put in a parameter's place after the optimizer was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.common.parameter_names import first_few
from layerwise.common.tensors import local_part
from layerwise.errors import warn
from layerwise.geometry.origin import Origin
from layerwise.optim.state.partial import WITH_ROWS, take
from layerwise.optim.work.job import Group, State


class Held(NamedTuple):
    """What stood for a name when it was last looked at."""

    param: Tensor
    entries: int  # of the parameter: its data may be resized in place
    origin: Origin | None = None  # the model that it came from, where that is known


@torch.no_grad()
def replace_state(groups: Sequence[Group], states: dict[Tensor, State], holders: Mapping[str, Held]) -> list[str]:
    """Make state for every parameter that has none, or of another size, from that of what stood for its name if it fits.

    Of an embedding or head with more or fewer rows, those that are in both keep their state.

    Args:
        groups: the optimizer's, with the tensors as they are now.
        states: by tensor; those of tensors that are gone are dropped.
        holders: what stood for each name.

    Returns:
        The names of the parameters whose state could not be carried over.
    """
    lost: list[str] = []
    live = set()
    for group in groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            live.add(param)
            held = holders.get(name, Held(param, param.numel()))
            if param not in states or (held.param is param and held.entries != param.numel()):
                new, old = group["update"].allocate(group, name, param), states.get(held.param, {})
                if has_moved(old) and not (carry_over(old, new) or take(new, old, group["role"] in WITH_ROWS)):
                    lost.append(name)
                states[param] = new
            move_beside(param, states[param])
    for param in states.keys() - live:
        del states[param]
    return lost


def move_beside(param: Tensor, state: State) -> None:
    """Bring the state to the device of its parameter: frameworks move a model after the optimizer was made."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.device != param.device:
            state[key] = value.to(param.device)


def has_moved(state: State) -> bool:
    """Whether a step has changed it: but for multipliers, which follow the rest, and sizes it starts as zeros."""
    constant = ("multiplier", "size")
    tensors = [value for key, value in state.items() if isinstance(value, Tensor) and key not in constant]
    return any(value.device.type != "meta" and bool(local_part(value).any()) for value in tensors)


@torch.no_grad()
def carry_over(old: State, new: State) -> bool:
    """Copy the old state into the new, in the new one's dtype and device; False where shapes or shardings differ."""
    if old.keys() != new.keys() or any(_form(old[key]) != _form(value) for key, value in new.items()):
        return False
    for key, value in new.items():
        if isinstance(value, Tensor):
            value.copy_(old[key])
    return True


def _form(value: object) -> object:
    if not isinstance(value, Tensor):
        return type(value)
    return value.shape, getattr(value, "device_mesh", None), getattr(value, "placements", None)


def warn_of_fresh_state(names: Sequence[str]) -> None:
    """Say whose state begins afresh."""
    warn(
        f"the optimizer's state (momentum, noise) of {first_few(map(repr, names))} begins afresh: after training "
        "had begun the parameter was replaced by one of another shape or sharding. Load the optimizer's state_dict after "
        "such a change to go on from where it was"
    )
