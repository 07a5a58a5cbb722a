"""State for tensors that a framework put in a parameter's place after the optimizer was made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.common.tensors import local_part
from layerwise.errors import warn
from layerwise.optim.work.job import State


def has_moved(state: State) -> bool:
    """Whether a step has changed it: but for the multipliers, which follow the rest, it starts as zeros."""
    tensors = [value for key, value in state.items() if isinstance(value, Tensor) and key != "multiplier"]
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
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warn(
            f"the optimizer's state (momentum, noise) of {', '.join(map(repr, names[:3]))}{more} begins afresh: after "
            "training had begun the parameter was replaced by one of another shape or sharding. Load the optimizer's "
            "state_dict after such a change to go on from where it was"
        )
