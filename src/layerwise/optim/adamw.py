"""AdamW for the groups that Muon and D-Muon give to it: torch's own, called as a function on our state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

State = dict[str, Any]


def allocate(param: Tensor) -> State:
    """The state torch.optim.AdamW would make at its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
    }


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    group: Mapping[str, Any],
    keep: Tensor | None,
) -> None:
    """One AdamW step of a group, in place. Where ``keep`` is false nothing changes."""
    for param, state in zip(params, states, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            if state[key].dtype != param.dtype:  # the model was cast after the optimizer was made
                state[key] = state[key].to(param.dtype)
    lr = group["lr"]
    # The fused kernel can be told on the device to do nothing, which is what `keep` needs.
    fused = keep is not None or isinstance(lr, Tensor)
    adamw(
        list(params),
        [grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        fused=fused or None,
        found_inf=None if keep is None else 1.0 - keep.float(),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
