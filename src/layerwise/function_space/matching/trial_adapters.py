"""Fresh LoRA adapters in a model of peft, for a few steps, after which nothing of them is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from layerwise.errors import LayerwiseError
from layerwise.function_space.steps.named_rates import unscheduled_rate

#: The name of the fresh adapter.
TRIAL = "layerwise_trial"
#: What of a group concerns the model's own parameters, or where its schedule stands.
_OWN = frozenset(("params", "param_names", "lr", "initial_lr", "step", "k", "momentum_steps"))


def renamed(name: str, old: str, new: str) -> str:
    """A parameter's name with another adapter's: `...lora_A.default.weight`."""
    return ".".join(new if part == old else part for part in name.split("."))


@contextmanager
def trial_adapter(model: Any, config: Any, seed: int) -> Iterator[None]:
    """A fresh adapter, drawn from a seed, alone active and alone trainable."""
    active = model.active_adapter
    torch.manual_seed(seed)
    model.add_adapter(TRIAL, config)
    try:
        model.set_adapter(TRIAL)
        for name, p in model.named_parameters():
            if TRIAL not in name.split("."):
                p.requires_grad_(False)
        model.train(model.training)
        yield
    finally:
        model.set_adapter(active)  # peft warns where an active one is deleted
        model.delete_adapter(TRIAL)


def twin(optimizer: Optimizer, model: nn.Module, adapter: str) -> Optimizer:
    """A new optimizer of the same class and options over the trial adapter, at the rates without a schedule.

    Raises:
        LayerwiseError: the class cannot be built from groups alone.
    """
    named = dict(model.named_parameters())
    names = {id(p): name for name, p in named.items()}
    groups = []
    for group in optimizer.param_groups:
        own = [renamed(names[id(p)], adapter, TRIAL) for p in group["params"] if id(p) in names]
        held = [name for name in own if name in named and TRIAL in name.split(".")]
        if held:
            kept = {key: value for key, value in group.items() if key not in _OWN}
            if "param_names" in group:
                kept["param_names"] = held
            groups.append({**kept, "params": [named[name] for name in held], "lr": unscheduled_rate(group)})
    if not groups:
        raise LayerwiseError(f"the optimizer holds no parameter of the adapter {adapter!r}: make it of this model's")
    kind: Any = type(optimizer)
    try:
        return cast(Optimizer, kind(groups))
    except TypeError as error:
        raise LayerwiseError(
            f"{type(optimizer).__name__} cannot be built from parameter groups alone ({error}): use FLeRM with a base file"
        ) from None
