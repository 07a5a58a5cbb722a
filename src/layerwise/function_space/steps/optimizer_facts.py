"""What has to be known of an optimizer: its parameters' names and rates, its settings, and whether dW = lr * u."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.runners import trainable

Group = dict[str, Any]

#: Group keys that say nothing about what an update is: rates, schedulers' and bookkeeping, how it is computed.
_NOT_SETTINGS = frozenset(
    {
        *("params", "param_names", "lr", "lr_scale", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"),
        *("foreach", "fused", "capturable", "differentiable", "step", "k"),
    }
)
#: Optimizers whose weight decay is decoupled (`W <- W - lr * wd * W`) without a group key that says so.
_DECOUPLED = frozenset(("AdamW", "Muon", "Lion", "SGDW", "LayerwiseOptimizer"))


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers that keep it as `.optimizer` (accelerate, Lightning, DeepSpeed)."""
    seen = optimizer
    while isinstance(getattr(seen, "optimizer", None), Optimizer):
        seen = seen.optimizer
    if not isinstance(seen, Optimizer):
        raise LayerwiseError(f"optimizer is {type(optimizer).__name__}: pass a torch.optim.Optimizer")
    return seen


def optimized(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The model's trainable parameters that the optimizer updates, by name."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = {name: p for name, p in trainable(model).items() if id(p) in held}
    if not found:
        raise LayerwiseError(
            "the optimizer holds none of the model's trainable parameters: was it made for another copy of the model?"
        )
    return found


def group_of(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Group]:
    """The parameter group of each name."""
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in parameters.items()}


def learning_rate(group: Group) -> float:
    """The group's rate now, as a float."""
    lr = group["lr"]
    if lr is None:
        raise LayerwiseError("a parameter group has lr=None: give it a number (Adafactor: relative_step=False)")
    return float(lr)


def lr_scale(optimizer: Optimizer, group: Group) -> float:
    """What our optimizers multiply the group's rate by in a step. Before others' steps timm's schedulers have done it."""
    return float(group.get("lr_scale", 1.0)) if _is_a(optimizer, {"LayerwiseOptimizer"}) else 1.0


def learning_rates(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """The rate that a step would take at each parameter now, by name."""
    groups = group_of(optimizer, parameters)
    return {name: learning_rate(group) * lr_scale(optimizer, group) for name, group in groups.items()}


def unscheduled_rates(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """`learning_rates` where every schedule has its multiplier at 1."""
    groups = group_of(optimizer, parameters)
    return {name: unscheduled_rate(group) * lr_scale(optimizer, group) for name, group in groups.items()}


def unscheduled_rate(group: Group) -> float:
    """The rate that the group's schedule multiplies: `initial_lr` where a scheduler has put it, else `lr`."""
    initial = group.get("initial_lr")
    return learning_rate(group) if initial is None else float(initial)


def settings(group: Group) -> dict[str, str]:
    """What an update depends on besides gradients and rate, as text: numbers, options, reprs of objects.

    Left out: lists and mappings, and `layout`, which says how one tensor's shape is read.
    """
    kept = {key: value for key, value in group.items() if key not in _NOT_SETTINGS and key != "layout"}
    return {
        key: str(float(value)) if isinstance(value, (int, float, Tensor)) and not isinstance(value, bool) else repr(value)
        for key, value in sorted(kept.items())
        if not isinstance(value, (list, dict)) and not (isinstance(value, Tensor) and value.numel() > 1)
    }


def settings_by_name(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """The settings of each parameter's group."""
    return {name: settings(group) for name, group in group_of(optimizer, parameters).items()}


def class_name(optimizer: Optimizer) -> str:
    """The optimizer's class, by the module it belongs to and its name."""
    kind = type(optimizer)
    return f"{kind.__module__.split('.', 1)[0]}.{kind.__qualname__}"


def decoupled(optimizer: Optimizer, group: Group) -> bool:
    """Whether weight decay in this group is `W <- W - lr * wd * W`."""
    return _is_a(optimizer, _DECOUPLED) or bool(group.get("decoupled_weight_decay") or group.get("weight_decouple"))


def _is_a(optimizer: Optimizer, names: Collection[str]) -> bool:
    """Whether the optimizer's class, or one that it comes from, has one of these names."""
    return any(kind.__name__ in names for kind in type(optimizer).__mro__)


def require_linear(optimizer: Optimizer) -> None:
    """Raise for an optimizer whose step is not proportional to `group["lr"]`: matching divides by it."""
    kind = type(optimizer).__name__
    for index, group in enumerate(optimizer.param_groups):
        reason = None
        if group.get("relative_step") or group.get("lr", 0) is None:
            reason = "it sets its own rate (relative_step): use relative_step=False and give lr a number"
        elif kind == "Adafactor" and "beta2_decay" in group:
            reason = "torch's Adafactor caps its rate at 1/sqrt(step): use transformers' with relative_step=False"
        elif "ScheduleFree" in kind or {"weight_sum", "lr_max"} <= set(group):
            reason = "it averages weights over the run (schedule-free): use the plain optimizer with a schedule"
        elif "d" in group:
            reason = "it estimates its own rate (D-Adaptation, Prodigy): use the plain optimizer"
        elif kind in ("LBFGS", "Rprop", "ASGD"):
            reason = "its step is not proportional to lr"
        elif "lr" not in group:
            reason = "its groups have no lr"
        if reason:
            raise LayerwiseError(f"FLeRM needs updates proportional to lr; {kind} (group {index}): {reason}")
