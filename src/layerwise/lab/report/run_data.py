"""Run directories as arrays: what figures and tables are made from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import LayerwiseError, warn
from layerwise.lab.config.identity import identity
from layerwise.lab.report.names import looks, optimizer_title
from layerwise.lab.report.style import Look
from layerwise.lab.runs.directory import RUN_FILE, Run, find_runs, read_run

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One quantity of a run: values at optimizer steps, with the tokens and seconds spent until then. All `[T]`."""

    steps: Array
    tokens: Array
    seconds: Array
    values: Array

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class LayerHistory:
    """What was recorded of each unit: matrices `[units, steps]`, NaN where a unit has no value at a step."""

    units: tuple[str, ...]
    steps: Array
    noise: Array
    multiplier: Array
    lr: Array

    @property
    def has_noise(self) -> bool:
        return bool(np.isfinite(self.noise).any() and np.nanmax(self.noise) > 0)

    @property
    def has_multiplier(self) -> bool:
        """Whether any unit's rate was ever changed: multipliers of one everywhere are not worth a figure."""
        finite = self.multiplier[np.isfinite(self.multiplier)]
        return bool(finite.size and np.abs(finite - 1).max() > 1e-6)


@dataclass(frozen=True)
class RunData:
    """A run read from its directory, with what figures ask of it."""

    run: Run

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def status(self) -> str:
        return self.run.status

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.run.config

    @property
    def optimizer(self) -> str:
        section = self.config.get("optimizer")
        name = section.get("name") if isinstance(section, Mapping) else section
        return str(name or "unknown")

    @property
    def parameters(self) -> Sequence[Mapping[str, Any]]:
        """The parameter table: name, role, geometry, norm_group, shape, layout, units."""
        return self.run.info.get("parameters") or ()

    @property
    def norm_groups(self) -> dict[str, str]:
        """Parameter name -> norm group."""
        return {
            str(row["name"]): str(row.get("norm_group") or row.get("geometry") or "")
            for row in self.parameters
        }

    @property
    def base_lr(self) -> float:
        """The base learning rate; where the config leaves it to the optimizer, the largest rate logged."""
        section = self.config.get("optimizer")
        stated = number(section.get("lr")) if isinstance(section, Mapping) else math.nan
        if math.isfinite(stated):
            return stated
        logged = [v for line in self.run.metrics if math.isfinite(v := number(line.get("lr")))]
        return max(logged, default=math.nan)

    @cached_property
    def train_loss(self) -> Series:
        return _series(self.run.metrics, "loss")

    @cached_property
    def val_loss(self) -> Series:
        return _series(self.run.metrics, "val_loss")

    @cached_property
    def layers(self) -> LayerHistory | None:
        return _layer_history(self.run.layers)

    @property
    def final_val_loss(self) -> float:
        """The last validation loss; infinite for a run that diverged, NaN where nothing was evaluated."""
        if self.status == "diverged":
            return math.inf
        return float(self.val_loss.values[-1]) if len(self.val_loss) else math.nan

    @property
    def best_val_loss(self) -> float:
        finite = self.val_loss.values[np.isfinite(self.val_loss.values)]
        return float(finite.min()) if finite.size else math.nan

    def last(self, key: str) -> float:
        """The last finite value of a metric; NaN where there is none."""
        return next(
            (v for line in reversed(self.run.metrics) if math.isfinite(v := number(line.get(key)))), math.nan
        )

    @property
    def tokens_per_second(self) -> float:
        """The median over the logged steps, so that a pause does not count."""
        values = [v for line in self.run.metrics if math.isfinite(v := number(line.get("tokens_per_second")))]
        return float(np.median(values)) if values else math.nan


@dataclass(frozen=True)
class Contender:
    """Runs that differ by their seed alone, with a label and a look."""

    label: str
    look: Look
    runs: tuple[RunData, ...]

    @property
    def optimizer(self) -> str:
        return self.runs[0].optimizer

    @property
    def final_losses(self) -> list[float]:
        return [run.final_val_loss for run in self.runs]


def number(value: Any) -> float:
    """A float from a record; NaN for what is not a number (JSON has null and strings for those)."""
    if isinstance(value, bool) or value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def load_runs(paths: Iterable[str | Path], note: Callable[[str], None] = warn) -> list[RunData]:
    """The runs at these paths; a folder stands for every run below it, less damaged ones, which `note` is told of.

    Raises LayerwiseError where there is none, and for a damaged run that is named itself.
    """
    runs: dict[Path, RunData] = {}
    for given in paths:
        if Path(given).is_file():
            raise LayerwiseError(
                f"run {given}: a file, not a run directory; name a folder that `layerwise train` wrote"
            )
        if not Path(given).is_dir():
            raise LayerwiseError(
                f"run {given}: no such directory; name a folder that `layerwise train` wrote"
            )
        named = (Path(given) / RUN_FILE).is_file()
        found = [Path(given)] if named else list(find_runs(given))
        if not found:
            raise LayerwiseError(
                f"run {given}: no {RUN_FILE} there or below; name a folder that `layerwise train` wrote"
            )
        damaged = []
        for folder in found:
            try:
                runs.setdefault(folder.resolve(), RunData(read_run(folder)))
            except LayerwiseError as error:
                damaged.append(str(error))
                if named or len(damaged) == len(found):
                    raise
        for message in damaged:
            note(f"left out: {message}")
    if not runs:
        raise LayerwiseError(
            "report: no run was named; name one run directory or more, such as runs/gpt2-tiny-lanton"
        )
    return list(runs.values())


def contenders(runs: Sequence[RunData]) -> list[Contender]:
    """Group runs over seeds, and name each group by its optimizer and by what else differs between the groups."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_identity(run), sort_keys=True, default=str), []).append(run)
    flat = [_identity(group[0]) for group in groups.values()]
    titles = [optimizer_title(group[0].optimizer) for group in groups.values()]
    labels = [
        title if titles.count(title) == 1 else f"{title} {_difference(i, titles, flat)}".strip()
        for i, title in enumerate(titles)
    ]
    labels = [label if labels.count(label) == 1 else f"{label} ({i + 1})" for i, label in enumerate(labels)]
    chosen = looks([group[0].optimizer for group in groups.values()])
    return [
        Contender(label, look, tuple(group))
        for label, look, group in zip(labels, chosen, groups.values(), strict=True)
    ]


def _identity(run: RunData) -> dict[str, Any]:
    """What the run is apart from its seed: runs of one contender have it in common."""
    corpus = run.run.info.get("corpus")
    found = identity(run.config, str((corpus or {}).get("sha256", "")))
    found.pop("training.seed", None)
    return found


def _difference(i: int, titles: Sequence[str], flat: Sequence[Mapping[str, Any]]) -> str:
    """What tells group `i` from the groups of the same optimizer."""
    same = [flat[j] for j, title in enumerate(titles) if title == titles[i]]
    keys = sorted({k for group in same for k in group})
    differing = [k for k in keys if len({json.dumps(g.get(k), default=str) for g in same}) > 1]

    def show(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{k.rsplit('.', 1)[-1]} {show(flat[i].get(k))}" for k in differing[:3])


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> Series:
    rows = [line for line in lines if key in line and line[key] is not None]
    columns = ([number(line.get(name)) for line in rows] for name in ("step", "tokens", "seconds", key))
    return Series(*(np.array(column, dtype=np.float64) for column in columns))


def _layer_history(lines: Sequence[Mapping[str, Any]]) -> LayerHistory | None:
    units = list(dict.fromkeys(unit for line in lines for unit in line.get("layers") or ()))
    if not units:
        return None
    row_of = {unit: i for i, unit in enumerate(units)}
    values = np.full((3, len(units), len(lines)), np.nan)
    for t, line in enumerate(lines):
        for unit, entry in (line.get("layers") or {}).items():
            for k, field in enumerate(("noise", "multiplier", "lr")):
                values[k, row_of[unit], t] = number(entry.get(field))
    steps = np.array([number(line["step"]) for line in lines])
    return LayerHistory(tuple(units), steps, *values)
