"""An optimizer by the names of its parameters: their groups, rates, decay and settings, and multipliers on the rates.

`decay="constant"` is decoupled weight decay that does not follow a matched rate. With `W <- W - lr * wd * W - lr * u`,
`"scaled"` (the paper's) measures and matches the whole step, so a matched rate multiplies the decay too. `"constant"`
measures and matches `lr * u` alone: `lr * wd * W` is taken out of the update, and `wd` is divided by what multiplies `lr`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.common.group_by import group_by
from layerwise.common.parameter_names import first_few, unwrap_optimizer
from layerwise.errors import LayerwiseError, warn

Group = dict[str, Any]
Decay = Literal["scaled", "constant"]

#: Group keys that say nothing about what an update is: rates, bookkeeping, how it is computed or a shape is read.
_NOT_SETTINGS = frozenset(
    {
        *("params", "param_names", "lr", "lr_scale", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"),
        *("layout", "foreach", "fused", "capturable", "differentiable", "step", "k"),
        *("momentum_steps", "rate_steps", "rounding_seed"),
    }
)
#: Where the rate that a group's schedule multiplies stands, the first of these that there is. OneCycleLR and CyclicLR rise
#: to `max_lr`; their `initial_lr` is where they begin.
UNSCHEDULED = ("max_lr", "initial_lr", "lr")
#: Optimizers whose weight decay is decoupled (`W <- W - lr * wd * W`) without a group key that says so.
_DECOUPLED = frozenset(("AdamW", "Muon", "Lion", "SGDW", "LayerwiseOptimizer"))
#: Optimizers whose rates are set by name: two that do so would multiply each other's split groups, more each step.
_TAKEN: WeakSet[Optimizer] = WeakSet()
_MEMBERS = ("params", "param_names")
_OURS = frozenset((*_MEMBERS, "lr", "weight_decay"))


def optimized(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The model's trainable parameters that the optimizer updates, by name."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) in held}
    if not found:
        raise LayerwiseError(
            "the optimizer holds none of the model's trainable parameters: was it made for another copy of the model?"
        )
    return found


def group_of(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Group]:
    """The parameter group of each name."""
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in parameters.items()}


def learning_rates(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], keys: Sequence[str] = ("lr",)
) -> dict[str, float]:
    """The rate that a step would take at each parameter now, by name; under the keys `UNSCHEDULED` without its schedule."""
    # Our optimizers multiply it by `lr_scale` in a step. Before others' steps timm's schedulers have done it.
    ours = any(kind.__name__ == "LayerwiseOptimizer" for kind in type(optimizer).__mro__)
    rates = {}
    for name, group in group_of(optimizer, parameters).items():
        rates[name] = group_rate(group, keys) * (float(group.get("lr_scale", 1.0)) if ours else 1.0)
    return rates


def group_rate(group: Group, keys: Sequence[str]) -> float:
    """A group's rate: what stands under the first of these keys that there is."""
    lr = next((group[key] for key in keys if group.get(key) is not None), None)
    if lr is None:
        raise LayerwiseError("a parameter group has lr=None: give it a number (Adafactor: relative_step=False)")
    return float(lr)


def settings_by_name(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """What each parameter's update depends on besides gradients and rate, as text: numbers, options, reprs of objects.

    Left out: lists and mappings, and `layout`, which says how one tensor's shape is read.
    """
    found: dict[str, dict[str, str]] = {}
    for name, group in group_of(optimizer, parameters).items():
        settings = found[name] = {}
        for key, value in sorted(group.items()):
            several = isinstance(value, (list, dict)) or (isinstance(value, Tensor) and value.numel() > 1)
            if not several and key not in _NOT_SETTINGS:
                number = isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
                settings[key] = str(float(value)) if number else repr(value)
    return found


def class_name(optimizer: Optimizer) -> str:
    """The optimizer's class, by the module it belongs to and its name."""
    kind = type(optimizer)
    return f"{kind.__module__.split('.', 1)[0]}.{kind.__qualname__}"


def require_linear(optimizer: Any) -> None:
    """Raise for an optimizer, wrapped or not, whose step is not proportional to `group["lr"]`: matching divides by it."""
    inner = unwrap_optimizer(optimizer)
    kind, around = type(inner).__name__, type(optimizer).__name__
    for index, group in enumerate(inner.param_groups):
        reason = None
        if group.get("relative_step") or group.get("lr", 0) is None:
            reason = "it sets its own rate (relative_step): use relative_step=False and give lr a number"
        elif kind == "Adafactor" and "beta2_decay" in group:
            reason = "torch's Adafactor caps its rate at 1/sqrt(step): use transformers' with relative_step=False"
        elif "ScheduleFree" in kind + around or {"weight_sum", "lr_max"} <= set(group):
            reason = "it averages weights over the run (schedule-free): use the plain optimizer with a schedule"
        elif "d" in group:
            reason = "it estimates its own rate (D-Adaptation, Prodigy): use the plain optimizer"
        elif kind in ("LBFGS", "Rprop", "ASGD"):
            reason = "its step is not proportional to lr"
        elif "lr" not in group:
            reason = "its groups have no lr"
        if reason:
            raise LayerwiseError(f"FLeRM needs updates proportional to lr; {kind} (group {index}): {reason}")


def constant_decay(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """`lr * weight_decay` of each parameter that has decay: that much of the weights is no part of the update.

    Raises:
        LayerwiseError: an optimizer whose decay is not decoupled.
    """
    decoupled = any(kind.__name__ in _DECOUPLED for kind in type(optimizer).__mro__)
    found, lrs = {}, learning_rates(optimizer, parameters)
    for name, group in group_of(optimizer, parameters).items():
        if group.get("weight_decay"):
            if not (decoupled or group.get("decoupled_weight_decay") or group.get("weight_decouple")):
                raise LayerwiseError(
                    f"decay='constant' needs decoupled weight decay, and {type(optimizer).__name__} adds its own to the "
                    "gradient: use decay='scaled' or AdamW"
                )
            found[name] = lrs[name] * float(group["weight_decay"])
    return found


class NamedRates:
    """Multipliers on the groups' learning rates, one per parameter.

    While the optimizer's `step` runs, each group is replaced by one group per multiplier in it; then the user's groups are
    back. Nobody else ever sees the split ones: schedulers go on writing `group["lr"]`, checkpoints have the user's groups,
    and multipliers of 1 cost nothing. Needs no more of an optimizer than that it reads `self.param_groups` and keeps its
    state by parameter.

    Multipliers follow names: a parameter that is replaced, in the model and the optimizer, keeps its own.

    Args:
        optimizer: whose rates are set.
        model: whose names its parameters have.
        decay: see above.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, decay: Decay = "scaled") -> None:
        if optimizer in _TAKEN:
            raise LayerwiseError(
                "another FLeRM or match_lora sets this optimizer's learning rates already: call detach() on that one first"
            )
        _TAKEN.add(optimizer)
        self.optimizer = optimizer
        self.model = model
        self.parameters = optimized(model, optimizer)
        self.multipliers = dict.fromkeys(self.parameters, 1.0)
        self.decay = decay
        self._held = _held(optimizer.param_groups)
        self._given: list[Group] | None = None
        self._parts: list[tuple[Group, list[Group]]] = []
        before, after = map(torch.compiler.disable, (self._before, self.restore))  # a compiled step would trace them
        self._hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)

    def learning_rates(self) -> dict[str, float]:
        """Each parameter's learning rate in the next step: its group's, times its multiplier."""
        self._follow()
        rates = learning_rates(self.optimizer, self.parameters)
        return {name: lr * self.multipliers[name] for name, lr in rates.items()}

    def take(self, multipliers: Mapping[str, float]) -> None:
        """Take multipliers by parameter name, all of them.

        Raises:
            LayerwiseError: they are of other parameters than those here.
        """
        different = sorted(multipliers.keys() ^ self.multipliers.keys())
        if different:
            raise LayerwiseError(f"the saved multipliers are of another model: {different[0]!r} is in one only")
        self.multipliers = dict(multipliers)

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        self.restore()
        for hook in self._hooks:
            hook.remove()
        _TAKEN.discard(self.optimizer)

    def _follow(self) -> None:
        """Name what the optimizer holds now, where that is no longer what it held."""
        held = _held(self.optimizer.param_groups)
        if held == self._held:
            return
        self._held, self.parameters = held, optimized(self.model, self.optimizer)
        joined = self.parameters.keys() - self.multipliers.keys()
        if joined:
            self.multipliers |= dict.fromkeys(joined, 1.0)
            warn(f"the optimizer got {first_few(sorted(joined))} after rates were matched: they take their groups' rates")

    def _before(self, *_: Any) -> None:
        self.restore()  # a step that raised outside of our context left the groups split
        if all(multiplier == 1.0 for multiplier in self.multipliers.values()):
            return
        self._follow()
        self._given = self.optimizer.param_groups
        names = {id(p): name for name, p in self.parameters.items()}
        self._parts = [(group, self._split(group, names)) for group in self._given]
        self.optimizer.param_groups = [part for _, parts in self._parts for part in parts]

    def _split(self, group: Group, names: Mapping[int, str]) -> list[Group]:
        multipliers = [self.multipliers.get(names.get(id(p), ""), 1.0) for p in group["params"]]
        places, parts = group_by(range(len(multipliers)), multipliers.__getitem__), []
        for number, (multiplier, indices) in enumerate(places.items()):
            # A counter held in the group as a tensor must not be advanced once per part.
            part = {k: v.clone() if number and isinstance(v, Tensor) else v for k, v in group.items()}
            for key in _MEMBERS:
                if key in group:
                    part[key] = [group[key][i] for i in indices]
            part["lr"] = group["lr"] * multiplier
            if self.decay == "constant" and group.get("weight_decay"):
                part["weight_decay"] = group["weight_decay"] / multiplier if multiplier else 0.0
            parts.append(part)
        return parts

    def restore(self, *_: Any) -> None:
        """Put the user's groups back, with whatever the step wrote into them: counters, parameters that it took over."""
        if self._given is None:
            return
        for group, parts in self._parts:
            group.update({key: value for part in parts[:1] for key, value in part.items() if key not in _OURS})
            if _held(parts) != _held([group]):
                for key in _MEMBERS:
                    if key in group:
                        group[key][:] = [member for part in parts for member in part[key]]
        split = {id(part) for _, parts in self._parts for part in parts}
        self._given += [group for group in self.optimizer.param_groups if id(group) not in split]
        self.optimizer.param_groups, self._given, self._parts = self._given, None, []


def _held(groups: Sequence[Group]) -> set[int]:
    """The identities of the tensors in some groups."""
    return {id(p) for group in groups for p in group["params"]}
