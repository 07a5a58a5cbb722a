"""What one watched step did to each module, and to the model as a whole; what of it stands out, and where it goes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, Literal

from torch.optim import Optimizer

from layerwise.common.alike_names import siblings_of
from layerwise.common.checked import checked
from layerwise.common.files import plain_json
from layerwise.common.group_by import group_by
from layerwise.common.layer_rate import LayerRate, parameter_of
from layerwise.common.text_table import folded, wrapped
from layerwise.errors import LayerwiseError
from layerwise.function_space.rates import JsonLines
from layerwise.function_space.steps.by_module import ModuleUpdate


@dataclass(frozen=True)
class ModuleReading:
    """One module at one step.

    Attributes:
        lr: its effective learning rate: the group's as the step took it, times what the optimizer's own layer rates (and
            FLeRM) make of it; of several rates their mean, weighted by entries.
        update: what the step did to its weights.
        rate: its function-space rate: the RMS change of the outputs, to first order; of several tensors the sum. None where
            that was not measured at this step.
        share: its part of the sum of all rates.
    """

    lr: float
    update: ModuleUpdate
    rate: float | None = None
    share: float | None = None

    def numbers(self) -> dict[str, float]:
        """What is known, by name."""
        found = {"lr": self.lr, **asdict(self.update), "rate": self.rate, "share": self.share}
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class Together:
    """The sum over layers beside its parts, in function space.

    Attributes:
        moved: RMS change of the outputs that the whole step made, from two forwards: nothing to first order.
        parts: the sum of the modules' rates: what `moved` would be if all pushed every output the same way.
        independent: the root of the sum of their squares: what it would be if they were independent.
    """

    moved: float
    parts: float
    independent: float

    @property
    def reinforcement(self) -> float:
        """`moved / independent`: above 1 the layers reinforce one another, below 1 they cancel."""
        return self.moved / self.independent if self.independent else math.nan


@dataclass(frozen=True)
class WatchRecord:
    """One watched step.

    Attributes:
        step: its number, counted from 1.
        modules: of each module with parameters that the optimizer updates.
        loss_change: what the step changes the loss of its own batch by, to first order; None without gradients.
        together: in function space, at the steps where that is measured.
        units: the optimizer's own rates, unit by unit, where it has such.
        unusual: modules that stand out.

    Examples:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> watch = lw.watch(model, optimizer)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> record = watch.records[0]
        >>> update = record.modules["(model)"].update
        >>> abs(update.update_rms - 0.1 * update.gradient_rms) < 1e-6
        True
        >>> sorted(record.to_dict())
        ['loss_change', 'modules', 'step']
    """

    step: int
    modules: Mapping[str, ModuleReading]
    loss_change: float | None = None
    together: Together | None = None
    units: Mapping[str, LayerRate] = field(default_factory=dict)
    unusual: Sequence[Unusual] = ()

    def __str__(self) -> str:
        """The table; of more than 40 modules those of blocks that are alike share a line."""
        titles, *rows = self._cells()
        return self._text([titles, *folded(rows)])

    def table(self) -> str:
        """A line a module, in the model's order; wider than 100 columns, the last ones come in a table below."""
        return self._text(self._cells())

    def _cells(self) -> list[tuple[str, ...]]:
        """The titles, and a row a module."""
        known = {name: reading.numbers() for name, reading in self.modules.items()}
        keys = list(dict.fromkeys(chain(*known.values())))
        rows = [(name, *(f"{of[key]:.3g}" if key in of else "" for key in keys)) for name, of in known.items()]
        return [("module", *(_TITLES[key] for key in keys)), *rows]

    def _text(self, cells: Sequence[Sequence[str]]) -> str:
        lines = [f"step {self.step}", *wrapped(cells)]
        if self.loss_change is not None:
            lines.append(f"predicted change of the loss: {self.loss_change:.3g}")
        if self.together is not None:
            t = self.together
            lines.append(
                f"outputs moved by {t.moved:.3g} (RMS); sum of the modules' rates {t.parts:.3g}, "
                f"root of their squares' sum {t.independent:.3g}: reinforcement {t.reinforcement:.2f}"
            )
        return "\n".join([*lines, *(str(line) for line in self.unusual)])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; what was not measured is absent, what is not finite is null."""
        together = self.together
        data = {
            "step": self.step,
            "modules": {name: reading.numbers() for name, reading in self.modules.items()},
            "loss_change": self.loss_change,
            "together": together and {**asdict(together), "reinforcement": together.reinforcement},
            "units": {name: unit._asdict() for name, unit in self.units.items()} or None,
            "unusual": [str(line) for line in self.unusual] or None,
        }
        return plain_json({key: value for key, value in data.items() if value is not None})

    def scalars(self) -> dict[str, float]:
        """Flat and finite numbers, for loggers: `update_rms/MODULE`, ..., `layer_lr/UNIT`, `layer_squared_norm/UNIT`."""
        found: dict[str, float] = {}
        for name, reading in self.modules.items():
            found |= {f"{key}/{name}": value for key, value in reading.numbers().items()}
        if self.loss_change is not None:
            found["watch/loss_change"] = self.loss_change
        if self.together is not None:
            found["watch/moved"] = self.together.moved
            found["watch/reinforcement"] = self.together.reinforcement
        found["watch/unusual"] = float(len(self.unusual))
        found |= unit_scalars(self.units)
        return {key: value for key, value in found.items() if math.isfinite(value)}


_TITLES = {
    "lr": "lr",
    "weight_rms": "weight",
    "update_rms": "update",
    "ratio": "ratio",
    "spectral": "spectral",
    "gradient_rms": "grad",
    "noise_to_signal": "noise",
    "loss_change": "loss chg",
    "rate": "fs rate",
    "share": "share",
}


Sink = Callable[[WatchRecord], object]


def _to_tensorboard(writer: Any, record: WatchRecord) -> None:
    for key, value in record.scalars().items():
        writer.add_scalar(key, value, record.step)


def _to_wandb(run: Any, record: WatchRecord) -> None:
    """To a wandb run, or to `wandb` itself once `wandb.init` was called."""
    # wandb counts steps of its own, which the user's other calls move on: ours goes along as a number.
    run.log({**record.scalars(), "watch/step": record.step}, commit=False)


def sinks_of(to: Any) -> list[Sink]:
    """What `watch(to=...)` means: nothing, a path, a SummaryWriter, a wandb run, a function, or a list of these.

    Raises:
        LayerwiseError: for anything else.
    """
    if to is None:
        return []
    if isinstance(to, (list, tuple)):
        return [sink for each in to for sink in sinks_of(each)]
    if isinstance(to, (str, Path)):
        return [JsonLines(to)]
    if hasattr(to, "add_scalar"):
        return [partial(_to_tensorboard, to)]
    if callable(to):
        return [to]
    if hasattr(to, "log"):
        return [partial(_to_wandb, to)]
    raise LayerwiseError(
        f"to is {type(to).__name__}: give a path, a function, a SummaryWriter, a wandb run, or a list of these"
    )


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
    follow, is none; against the median of its last `window` values, from `least` of them on, and anew where modules are
    frozen or unfrozen. Siblings: against the median of the modules of the same shape in the same place of other blocks,
    from three of them on. A module is named when it gets there, and again after it was back.

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
        moving = {name: value for name, value in updates.items() if value > 0 and math.isfinite(value)}
        if not moving:  # a rate of 0, or a step that was skipped
            return []
        if not moving.keys() <= self._history.keys() <= updates.keys():  # frozen or unfrozen: a median of other modules
            self._history.clear()
        common = median(moving.values())
        found = [*self._off_history(step, updates, common), *self._off_siblings(step, updates, shapes)]
        for name, value in moving.items():
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


def unit_rates(optimizer: Optimizer, lrs: Mapping[str, float] | None = None) -> dict[str, LayerRate]:
    """What an optimizer tells by `layer_rates()`, by unit; nothing where it has no such method.

    The one place that asks: a watch's records and `log_layer_rates` are views of this.

    Args:
        optimizer: any; one that sets rates of its own waits for the device once.
        lrs: the rates of the groups as a step took them, by parameter name; default: as they are.
    """
    told = getattr(optimizer, "layer_rates", None)
    rates: dict[str, LayerRate] = {} if told is None else told()
    if lrs is None:
        return rates
    return {
        unit: rate._replace(lr=lrs[parameter] * rate.multiplier) if (parameter := parameter_of(unit)) in lrs else rate
        for unit, rate in rates.items()
    }


def unit_scalars(units: Mapping[str, LayerRate]) -> dict[str, float]:
    """`{"layer_lr/UNIT": rate, "layer_squared_norm/UNIT": ...}`, for loggers; no norm where none is measured."""
    found: dict[str, float] = {}
    for name, unit in units.items():
        found[f"layer_lr/{name}"] = unit.lr
        if not math.isnan(unit.squared_norm):
            found[f"layer_squared_norm/{name}"] = unit.squared_norm
    return found
