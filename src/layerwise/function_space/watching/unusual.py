"""Which module does something that it did not do before, or that no module like it does."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType
from typing import Any, Literal

from layerwise.common.alike_names import siblings_of
from layerwise.common.checked import checked
from layerwise.common.group_by import group_by


@dataclass(frozen=True)
class Unusual:
    """A module whose update is out of the ordinary; `str()` is a line that says so.

    Attributes:
        step, module: where.
        update_rms: the RMS of its update.
        factor: how many times that is what was expected.
        against: `history`: its own before, relative to the other modules; `siblings`: modules of the same place in other
            blocks.
        pattern: the siblings, with `*` for the number of the block.
    """

    step: int
    module: str
    update_rms: float
    factor: float
    against: Literal["history", "siblings"]
    pattern: str = ""

    def __str__(self) -> str:
        other = f"its siblings {self.pattern}" if self.against == "siblings" else "before, next to the other modules"
        moves = f"moves {self.factor:.3g} times as far as {other}" if self.factor else f"does not move, unlike {other}"
        return f"step {self.step}: {self.module} {moves} (RMS of its update {self.update_rms:.3g})"


@checked
@dataclass
class UnusualRule:
    """Names modules whose update is `factor` times off their own history or their siblings, up or down.

    History: the RMS of a module's update over the median of all modules', so that a schedule or a warm-up, which all
    follow, is none; against the median of its last `window` values, from `least` of them on. Siblings: against the median of
    the modules of the same shape in the same place of other blocks, from three of them on. A module is named when it gets
    there, and again after it was back.

    Attributes:
        factor: how far off is unusual.
        window: how many values history is at most.
        least: how many it is at least.

    Examples:
        >>> rule = lw.UnusualRule(factor=3, least=2)
        >>> updates = {"a": 1e-3, "b": 1e-3, "c": 2e-3}
        >>> for step in (1, 2, 3):
        ...     assert rule.judge(step, updates) == []
        >>> [unusual] = rule.judge(4, {**updates, "b": 8e-3})
        >>> unusual.module, unusual.against, unusual.factor
        ('b', 'history', 4.0)
    """

    factor: float = 3.0
    window: int = 20
    least: int = 5
    _history: dict[str, deque[float]] = field(default_factory=dict)
    _named: set[tuple[str, str]] = field(default_factory=set)

    def judge(
        self, step: int, updates: Mapping[str, float], shapes: Mapping[str, Any] = MappingProxyType({})
    ) -> list[Unusual]:
        """The modules that have become unusual at this step.

        Args:
            step: its number.
            updates: RMS of each module's update.
            shapes: of each module's parameters, which siblings have in common: the layers of a chain are no blocks.
        """
        moving = [value for value in updates.values() if value > 0 and math.isfinite(value)]
        if not moving:  # a rate of 0, or a step that was skipped
            return []
        common = median(moving)
        found = [*self._off_history(step, updates, common), *self._off_siblings(step, updates, shapes)]
        for name, value in updates.items():
            if value > 0 and math.isfinite(value):
                self._history.setdefault(name, deque(maxlen=self.window)).append(math.log(value / common))
        now: set[tuple[str, str]] = {(unusual.module, unusual.against) for unusual in found}
        new = [unusual for unusual in found if (unusual.module, unusual.against) not in self._named]
        self._named = now
        return new

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the history, and who was named."""
        return {
            "history": {name: list(values) for name, values in self._history.items()},
            "named": sorted(map(list, self._named)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._history = {name: deque(values, self.window) for name, values in state["history"].items()}
        self._named = {(module, against) for module, against in state["named"]}

    def _off_history(self, step: int, updates: Mapping[str, float], common: float) -> Iterable[Unusual]:
        for name, value in updates.items():
            before = self._history.get(name, ())
            if len(before) >= self.least:
                off = value / common / math.exp(median(before))
                if self._is_off(off):
                    yield Unusual(step, name, value, off, "history")

    def _off_siblings(self, step: int, updates: Mapping[str, float], shapes: Mapping[str, Any]) -> Iterable[Unusual]:
        for (pattern, _), names in group_by(updates, lambda name: (siblings_of(name), shapes.get(name))).items():
            middle = median(updates[name] for name in names)
            if len(names) < 3 or not middle > 0:
                continue
            for name in names:
                if self._is_off(updates[name] / middle):
                    yield Unusual(step, name, updates[name], updates[name] / middle, "siblings", pattern)

    def _is_off(self, ratio: float) -> bool:
        return not 1 / self.factor <= ratio <= self.factor
