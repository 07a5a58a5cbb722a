"""Running the trials of a sweep that have no result yet, and its results: one JSONL file, a line per finished trial."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from layerwise.errors import LayerwiseError
from layerwise.lab.experiments.sweep.engines import Engine, LocalEngine
from layerwise.lab.experiments.sweep.trials import BASE_FILE, Plan, Point, SweepConfig, make_plan, run_trial
from layerwise.lab.runs.directory import in_the_way, locked, versions, write_json
from layerwise.lab.runs.recorded import number
from layerwise.lab.training.observers import PlainProgress
from layerwise.lab.training.run import check_buildable, record

RESULTS = "results.jsonl"


def run_sweep(config: SweepConfig, engine: Engine | None = None) -> dict[Point, str]:
    """Runs what is missing: `results.jsonl`, `base.json` and `sweep.json` in the sweep's folder, `config.run_path`.

    A trial that has a result is never repeated, under whichever engine (default `LocalEngine()`): its identity is the
    hash of its whole config, so results stay good when grids or sizes are added. One that dies is reported, leaves no
    result, and so is run again the next time.

    Returns:
        The points whose trial gave no result this time, each with the reason.

    Raises:
        LayerwiseError: for a config that cannot be run.
    """
    plan, folder = make_plan(config), config.run_path
    check_folder(folder)
    failures: dict[Point, str] = {}
    with open_results(folder) as file:
        done = read_results(folder)
        todo = [trial for id, trial in plan.trials.items() if id not in done]
        write_json(folder / "sweep.json", {"config": config.model_dump(), "versions": versions()})
        if not todo:
            return failures
        check_methods(plan)
        base = None
        if any(trial.base is not None for trial in todo):  # made anew each time: of a plan it is always the same
            record(plan.base, config.sweep.base_seeds).save(folder / BASE_FILE)
            base = (folder / BASE_FILE).read_text(encoding="utf-8")
        work = partial(run_trial, base=base, wanted=versions())
        shown, before = PlainProgress(unit="trial"), len(plan.trials) - len(todo)
        shown.start(config.run_name, len(plan.trials), before)
        for ended, (trial, row) in enumerate((engine or LocalEngine()).results(work, todo), start=before + 1):
            if isinstance(row, str):
                point = next(point for point, each in plan.points.items() if each.id == trial.id)
                failures[point] = row
                shown.note(f"failed: {point}: {row}")
                said = "failed"
            else:
                append_result(file, row)
                said = str(row["status"]) if row["val_loss"] is None else f"last loss {row['val_loss']:.3f}"
            shown.numbers(ended, said)
    return failures


def check_methods(plan: Plan) -> None:
    """Builds a trial of every method at every size. Raises LayerwiseError for one that cannot be."""
    first = {(point.method, point.size): trial for point, trial in reversed(plan.points.items())}
    without_base = {"function_space.match": None}  # which is not recorded yet
    check_buildable(trial.alone({} if trial.base is None else without_base) for trial in first.values())


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by trial id. Lines that are none, such as half a last one of a killed process, do not count."""
    path = folder / RESULTS
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("id"), str):
                rows[row["id"]] = row
    return rows


def check_folder(folder: Path) -> None:
    """Raises LayerwiseError where something else than a sweep is in its place."""
    there = in_the_way(folder)
    begun = there == [RESULTS] and not (folder / RESULTS).stat().st_size
    if there and "sweep.json" not in there and not begun and not read_results(folder):
        raise LayerwiseError(
            f"run.name: {folder} holds {', '.join(there[:5])} and no sweep.json, so it is no sweep of ours: it is left"
            " as it is; set another run.name"
        )


def loss_of(row: Mapping[str, Any], key: str) -> float:
    """`loss` or `val_loss` of a result; infinite where the run diverged."""
    value = number(row.get(key))
    return value if row.get("status") == "finished" and math.isfinite(value) else math.inf


@contextmanager
def open_results(folder: Path) -> Iterator[BinaryIO]:
    """The file, locked while it is written to, half a last line cut off.

    Raises LayerwiseError where another process writes this sweep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RESULTS, "ab+") as file:
        if not locked(file):
            raise LayerwiseError(f"sweep {folder}: another process is running it")
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield file


def append_result(file: BinaryIO, row: dict[str, Any]) -> None:
    """One line in one write, on the disk when this returns."""
    file.write(json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
