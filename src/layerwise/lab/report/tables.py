"""The tables of a report: results per contender, parameters, and what ran."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from layerwise.common.text_table import count
from layerwise.lab.config.keys import flatten
from layerwise.lab.report.grouping import Contender, RateCurve, standing_out
from layerwise.lab.report.style import BAND
from layerwise.lab.runs.recorded import Run, duration, number


class ResultRow(NamedTuple):
    """One contender's line in the summary: its colour, whether it is the best of several, and title -> text."""

    color: str
    leads: bool
    cells: dict[str, str]


def result_rows(contenders: Sequence[Contender]) -> list[ResultRow]:
    """Contenders from the lowest final validation loss to the highest; those that diverged last."""
    ranked = sorted(contenders, key=lambda c: c.mean_loss)
    contest = len(ranked) > 1 and all(run.status != "running" for c in ranked for run in c.runs)
    several = any(len(c.runs) > 1 for c in ranked)
    coloured = standing_out(ranked)
    return [
        ResultRow(c.look.color if c in coloured else BAND, contest and c is ranked[0], _result_cells(c, several))
        for c in ranked
    ]


def _result_cells(contender: Contender, several: bool) -> dict[str, str]:
    """The cells of a contender; `several`: seeds, with what lies between them."""
    runs = contender.runs
    finite = [v for v in contender.final_losses if math.isfinite(v)]
    spread = f"{max(finite) - min(finite):.4f}" if len(finite) > 1 else ""
    states = [run.status if run.status != "running" else "unfinished" for run in runs]
    status = states[0] if len(set(states)) == 1 else ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    return {
        "optimizer": contender.label,
        "base rate": show(_mean([run.base_lr for run in runs]), ".3g"),
        "val. loss": show(contender.mean_loss, ".4f"),
        **({"spread": spread, "seeds": str(len(runs))} if several else {}),
        "best loss": show(_mean([run.best_val_loss for run in runs]), ".4f"),
        "tokens": _count(_mean([run.last("tokens") for run in runs])),
        "time": duration(_mean([run.last("seconds") for run in runs])),
        "tokens/s": _count(_mean([run.tokens_per_second for run in runs])),
        "status": status,
    }


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return float(np.mean(finite)) if finite else math.nan


def show(value: float, spec: str) -> str:
    """A number, or a dash for what is not known."""
    return format(value, spec) if math.isfinite(value) else "\u2013"


def _count(value: float) -> str:
    return count(float(f"{value:.3g}")) if math.isfinite(value) else "\u2013"


def parameter_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The longest parameter table of the runs, its values as text."""
    table = max((run.parameters for run in runs), key=len, default=())
    return [
        {
            **{column: row.get(column, "") for column in ("name", "role", "geometry", "norm_group", "layout")},
            "shape": " \u00d7 ".join(map(str, row.get("shape") or ())),
            "units": _units(row.get("units")),
        }
        for row in table
    ]


def _units(units: Any) -> str:
    """How many units, and what they are called within the parameter where that is short."""
    if not isinstance(units, list | tuple):
        return "" if units is None else str(units)
    inner = [str(u).split("[", 1)[1].rstrip("]") for u in units if "[" in str(u)]
    return f"{len(units)}" + (f" ({', '.join(inner)})" if inner and len(inner) <= 6 else "")


class Settings(NamedTuple):
    """Settings of all runs: those they share, and those that differ, with a value for each contender."""

    shared: list[tuple[str, str]]
    differing: list[tuple[str, list[str]]]


def settings(contenders: Sequence[Contender]) -> Settings:
    """The resolved configs side by side. Where a run is written is no setting of it."""
    flats = [flatten(c.runs[0].config) for c in contenders]
    keys = [key for key in dict.fromkeys(k for flat in flats for k in flat) if not key.startswith("run.")]
    shared, differing = [], []
    for key in keys:
        if key == "training.seed":
            values = [", ".join(_text(flatten(r.config).get(key)) for r in c.runs) for c in contenders]
        else:
            values = [_text(flat[key]) if key in flat else "\u2013" for flat in flats]
        if len(set(values)) == 1:
            shared.append((key, values[0]))
        else:
            differing.append((key, values))
    return Settings(shared, differing)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def facts(runs: Sequence[Run], entry: str) -> list[tuple[str, str]]:
    """One entry of run.json (`versions`, `machine`, `corpus`) as rows; where runs differ, all values."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        value = run.info.get(entry)
        for key, item in flatten(value).items() if isinstance(value, dict) else ():
            text = f"{item:,}" if isinstance(item, int) and not isinstance(item, bool) and item >= 10_000 else _text(item)
            if text not in rows.setdefault(key, []):
                rows[key].append(text)
    return [(key, "; ".join(values)) for key, values in rows.items()]


def headline(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """A few facts for the top of the page: model, size, corpus, length, machine; what runs differ in is left out."""

    def common(values: Sequence[str]) -> str:
        return values[0] if values and len(set(values)) == 1 else ""

    flats = [flatten(run.config) for run in runs]
    counts = [number(run.info.get("parameter_count")) for run in runs]
    devices = [str((run.info.get("machine") or {}).get("device", "")) for run in runs]
    items = [
        ("model", common([str(f.get("model.preset") or f.get("model.family") or "") for f in flats])),
        ("parameters", common([_count(c) if math.isfinite(c) else "" for c in counts])),
        ("data", common([str(f.get("data.source") or "") for f in flats])),
        ("trained on", common([f"{_count(run.last('tokens'))} {run.counted}" for run in runs])),
        ("device", common(devices)),
    ]
    return [(name, text) for name, text in items if text]


def grid_rows(curves: Sequence[RateCurve]) -> list[tuple[str, str, str]]:
    """Every rate of every grid with its losses over seeds, for a table."""
    return [
        (curve.label, f"{lr:g}", ", ".join(f"{v:.4f}" if math.isfinite(v) else "diverged" for v in curve.losses[lr]))
        for curve in curves
        for lr in curve.rates
    ]
