"""A run read back from its directory, what figures and tables ask of it, and its numbers in words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Above float32's largest: no run records it, a damaged file may hold it, and the axes of figures overflow.
LARGEST: Final = 1e39
#: Values of `data.source` whose examples are images and their classes, not rows of tokens.
IMAGES: Final = ("digits", "fashion-mnist")


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
    squared_norm: Array
    multiplier: Array
    lr: Array

    @property
    def has_norms(self) -> bool:
        return bool((self.squared_norm > 0).any())

    @property
    def has_multiplier(self) -> bool:
        """Whether any unit's rate was ever changed: multipliers of one everywhere are not worth a figure."""
        return bool(self._changed.any())

    @property
    def ruled(self) -> list[str]:
        """Units that a rule measures or whose rate it sets: of the others, such as AdamW's, there is nothing to draw."""
        touched = ((self.squared_norm > 0) | self._changed).any(axis=1)
        return [self.units[row] for row in np.flatnonzero(touched)]

    @property
    def _changed(self) -> NDArray[np.bool_]:
        """Where a multiplier is not one; false where there is none."""
        return np.abs(self.multiplier - 1.0) > 1e-6


@dataclass(frozen=True)
class Run:
    """A run read back from its directory: what run.json says, and its records, which are read when they are asked for.

    `info` is what run.json holds: `name`, `status` ("running", "finished", "diverged"), `config` (sections as in the
    YAML file, every default written out), `versions`, `machine`, `corpus` (source, sha256, tokenizer, sizes),
    `parameters` (rows of `describe`), `parameter_count`, `started`, `result` (empty until the end: `steps`,
    `tokens`, `seconds`, `loss`, `val_loss`, `best_val_loss`, `tokens_per_second`, and `reason` where it
    diverged). Losses are in nats per token, or per image. A killed run stays "running".
    """

    path: Path
    info: dict[str, Any]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "metrics.jsonl")

    @cached_property
    def layers(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "layers.jsonl")

    @cached_property
    def function_space(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "function_space.jsonl")

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.path.name)

    @property
    def status(self) -> str:
        return str(self.info.get("status", "running"))

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.info.get("config") or {})

    @property
    def counted(self) -> str:
        """What `tokens` counts and losses are means over: `tokens`, or `images`."""
        data = self.config.get("data")
        return "images" if isinstance(data, Mapping) and data.get("source") in IMAGES else "tokens"

    @property
    def result(self) -> dict[str, Any]:
        return dict(self.info.get("result") or {})

    @property
    def optimizer(self) -> str:
        section = self.config.get("optimizer")
        name = section.get("name") if isinstance(section, Mapping) else section
        return str(name or "unknown")

    @property
    def parameters(self) -> Sequence[Mapping[str, Any]]:
        """The parameter table: name, role, geometry, norm_group, shape, layout, units."""
        return self.info.get("parameters") or ()

    @property
    def norm_groups(self) -> dict[str, str]:
        """Parameter name -> norm group."""
        return {str(row["name"]): str(row.get("norm_group") or row.get("geometry") or "") for row in self.parameters}

    @property
    def base_lr(self) -> float:
        """The base learning rate; where the config leaves it to the optimizer, the largest rate logged."""
        section = self.config.get("optimizer")
        stated = number(section.get("lr")) if isinstance(section, Mapping) else math.nan
        if math.isfinite(stated):
            return stated
        return max(self._finite("lr"), default=math.nan)

    def _finite(self, key: str) -> list[float]:
        """What is known of a metric, in the order of the steps."""
        return [value for line in self.metrics if math.isfinite(value := number(line.get(key)))]

    def series(self, key: str) -> Series:
        """A metric at the steps that have it."""
        rows = [line for line in self.metrics if line.get(key) is not None]
        columns = ([number(line.get(name)) for line in rows] for name in ("step", "tokens", "seconds", key))
        return Series(*(np.array(column, dtype=np.float64) for column in columns))

    @cached_property
    def train_loss(self) -> Series:
        return self.series("loss")

    @cached_property
    def val_loss(self) -> Series:
        return self.series("val_loss")

    @cached_property
    def history(self) -> LayerHistory | None:
        """What was recorded of each unit; None where nothing was."""
        units = list(dict.fromkeys(unit for line in self.layers for unit in line.get("layers") or ()))
        if not units:
            return None
        row_of = {unit: i for i, unit in enumerate(units)}
        values = np.full((3, len(units), len(self.layers)), np.nan)
        for t, line in enumerate(self.layers):
            for unit, entry in (line.get("layers") or {}).items():
                norm = entry.get("squared_norm", entry.get("noise"))  # as runs of 0.1.0 call it
                values[:, row_of[unit], t] = [number(norm), number(entry.get("multiplier")), number(entry.get("lr"))]
        steps = np.array([number(line.get("step")) for line in self.layers])
        return LayerHistory(tuple(units), steps, *values)

    @property
    def final_val_loss(self) -> float:
        """The last validation loss; infinite for a run that diverged, NaN where nothing was evaluated."""
        if self.status == "diverged":
            return math.inf
        return float(self.val_loss.values[-1]) if len(self.val_loss) else math.nan

    @property
    def best_val_loss(self) -> float:
        return min(self._finite("val_loss"), default=math.nan)

    def last(self, key: str) -> float:
        """The last finite value of a metric; NaN where there is none."""
        known = self._finite(key)
        return known[-1] if known else math.nan

    @property
    def tokens_per_second(self) -> float:
        """The median over the logged steps, so that a pause does not count."""
        values = self._finite("tokens_per_second")
        return float(np.median(values)) if values else math.nan


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, up to the first line that is not one. A missing file has none."""
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return rows
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or not _is_record(row):
            break
        rows.append(row)
    return rows


def _is_record(row: dict[str, Any]) -> bool:
    """Whether a line has layers or parameters by name, at a step, where it has any."""
    for held in (row.get("layers"), row.get("rates")):
        if held is not None and not math.isfinite(number(row.get("step"))):
            return False
        if not isinstance(held, dict | None) or not all(isinstance(e, dict) for e in (held or {}).values()):
            return False
    return True


def number(value: Any) -> float:
    """A float from a record; NaN for what is not a number (JSON has null and strings for those), or beyond `LARGEST`."""
    if isinstance(value, bool) or value is None:
        return math.nan
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return found if abs(found) <= LARGEST else math.nan


def duration(seconds: float) -> str:
    """`48 s`, `3 min 05 s`, `2 h 10 min`; a dash for what is not known."""
    if not math.isfinite(seconds):
        return "\u2013"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
