"""Learning rates by parameter name, whatever the optimizer's groups are and whoever schedules them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer

from layerwise.errors import LayerwiseError
from layerwise.function_space.steps.decay import Decay, kept_constant
from layerwise.function_space.steps.optimizer_facts import Group, learning_rates

#: Optimizers whose rates are set by name: two that do so would multiply each other's split groups, more each step.
_TAKEN: WeakSet[Optimizer] = WeakSet()
_OURS = frozenset(("params", "param_names", "lr", "weight_decay"))


class NamedRates:
    """Multipliers on the groups' learning rates, one per parameter.

    While the optimizer's `step` runs, each group is replaced by one group per multiplier in it; then the user's groups are
    back. Nobody else ever sees the split ones: schedulers go on writing `group["lr"]`, checkpoints have the user's groups,
    and multipliers of 1 cost nothing. Needs no more of an optimizer than that it reads `self.param_groups` and keeps its
    state by parameter.

    Args:
        optimizer: whose rates are set.
        parameters: by name.
        decay: see `steps/decay.py`.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, Tensor], decay: Decay = "scaled") -> None:
        if optimizer in _TAKEN:
            raise LayerwiseError(
                "another FLeRM sets this optimizer's learning rates already: call detach() on that one first"
            )
        _TAKEN.add(optimizer)
        self.optimizer = optimizer
        self.parameters = parameters
        self.ids = {id(p): name for name, p in parameters.items()}
        self.multipliers = dict.fromkeys(parameters, 1.0)
        self.decay = decay
        self._given: list[Group] | None = None
        self._parts: list[tuple[Group, Group]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self.restore),
        ]

    def learning_rates(self) -> dict[str, float]:
        """Each parameter's learning rate in the next step: its group's, times its multiplier."""
        rates = learning_rates(self.optimizer, self.parameters)
        return {name: lr * self.multipliers[name] for name, lr in rates.items()}

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        self.restore()
        for hook in self._hooks:
            hook.remove()
        _TAKEN.discard(self.optimizer)

    def _before(self, *_: Any) -> None:
        self.restore()  # a step that raised outside of our context left the groups split
        if all(multiplier == 1.0 for multiplier in self.multipliers.values()):
            return
        self._given = self.optimizer.param_groups
        self._parts = []
        split: list[Group] = []
        for group in self._given:
            parts = self._split(group)
            if parts:
                self._parts.append((group, parts[0]))
            split.extend(parts)
        self.optimizer.param_groups = split

    def _split(self, group: Group) -> list[Group]:
        places: dict[float, list[int]] = {}
        for index, p in enumerate(group["params"]):
            places.setdefault(self.multipliers.get(self.ids.get(id(p), ""), 1.0), []).append(index)
        parts = []
        for number, (multiplier, indices) in enumerate(places.items()):
            # A counter held in the group as a tensor must not be advanced once per part.
            part = {k: v.clone() if number and isinstance(v, Tensor) else v for k, v in group.items()}
            for key in ("params", "param_names"):
                if key in group:
                    part[key] = [group[key][i] for i in indices]
            part["lr"] = group["lr"] * multiplier
            if self.decay == "constant" and group.get("weight_decay"):
                part["weight_decay"] = kept_constant(group, multiplier)
            parts.append(part)
        return parts

    def restore(self, *_: Any) -> None:
        """Put the user's groups back, with whatever the step wrote into them (counters)."""
        if self._given is None:
            return
        for group, part in self._parts:
            group.update({key: value for key, value in part.items() if key not in _OURS})
        self.optimizer.param_groups, self._given, self._parts = self._given, None, []
