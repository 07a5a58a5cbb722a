"""What one watched step did to each module, and to the model as a whole; printed, as plain data, and where it goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from layerwise.common.files import plain_json
from layerwise.common.layer_rate import LayerRate
from layerwise.common.text_table import folded, wrapped
from layerwise.errors import LayerwiseError
from layerwise.function_space.steps.by_module import ModuleUpdate
from layerwise.function_space.steps.json_lines import JsonLines
from layerwise.function_space.watching.unit_rates import unit_scalars
from layerwise.function_space.watching.unusual import Unusual


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
        return self._text(folded(self._rows()))

    def table(self) -> str:
        """A line a module, in the model's order; wider than 100 columns, the last ones come in a table below."""
        return self._text(self._rows())

    def _keys(self) -> list[str]:
        return list(dict.fromkeys(key for reading in self.modules.values() for key in reading.numbers()))

    def _rows(self) -> list[tuple[str, ...]]:
        known = [(name, reading.numbers()) for name, reading in self.modules.items()]
        return [
            (name, *(f"{numbers[key]:.3g}" if key in numbers else "" for key in self._keys())) for name, numbers in known
        ]

    def _text(self, rows: Sequence[Sequence[str]]) -> str:
        lines = [f"step {self.step}", *wrapped([("module", *(_TITLES[key] for key in self._keys())), *rows])]
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
        data: dict[str, Any] = {
            "step": self.step,
            "modules": {name: reading.numbers() for name, reading in self.modules.items()},
        }
        if self.loss_change is not None:
            data["loss_change"] = self.loss_change
        if self.together is not None:
            data["together"] = {**asdict(self.together), "reinforcement": self.together.reinforcement}
        if self.units:
            data["units"] = {name: unit._asdict() for name, unit in self.units.items()}
        if self.unusual:
            data["unusual"] = [str(line) for line in self.unusual]
        return plain_json(data)

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
