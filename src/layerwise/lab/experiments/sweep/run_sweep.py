"""Running the trials of a sweep that have no result yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from layerwise.lab.config.schema import Config
from layerwise.lab.config.validate import validate
from layerwise.lab.experiments.record_base import record
from layerwise.lab.experiments.sweep.engines import Engine, Failure, Row
from layerwise.lab.experiments.sweep.engines.this_machine import LocalEngine
from layerwise.lab.experiments.sweep.results import RESULTS, ResultsFile, check_folder, read_results
from layerwise.lab.experiments.sweep.sweep_config import SweepConfig
from layerwise.lab.experiments.sweep.trial import run_trial, start_worker
from layerwise.lab.experiments.sweep.trial_plan import BASE_FILE, Plan, Point, Trial, make_plan
from layerwise.lab.runs.directory import write_json
from layerwise.lab.runs.environment import versions
from layerwise.lab.training.progress import ProgressKind, make_progress
from layerwise.lab.training.run import check_buildable


@dataclass(frozen=True)
class Sweep:
    """Where the results are, and the points whose trial gave none this time, each with the reason."""

    folder: Path
    failures: Mapping[Point, str]


def run_sweep(config: SweepConfig, engine: Engine | None = None, progress: ProgressKind = "plain") -> Sweep:
    """Runs what is missing: `results.jsonl`, `base.json` and `sweep.json` in the sweep's folder.

    A trial that has a result is never repeated, under whichever engine (default `LocalEngine()`): its identity is the
    hash of its whole config, so results stay good when grids or sizes are added. One that dies is reported, leaves no
    result, and so is run again the next time.

    Raises LayerwiseError for a config that cannot be run.
    """
    plan, folder = make_plan(config), config.run_path
    check_folder(folder)
    failures: dict[Point, str] = {}
    with ResultsFile(folder / RESULTS) as file:
        done = read_results(file.path)
        todo = [trial for id, trial in plan.trials.items() if id not in done]
        if todo:
            check_buildable(representatives(plan).values())
        write_json(folder / "sweep.json", {"config": config.model_dump(), "versions": versions()})
        needs_base = any(trial.needs_base for trial in todo)
        work = partial(run_trial, base=_record_base(plan, config, folder / BASE_FILE) if needs_base else None)
        start = partial(start_worker, wanted=versions())
        shown = make_progress(progress, unit="trial")
        shown.start(config.run_name, len(plan.trials), len(plan.trials) - len(todo))
        results = (engine or LocalEngine()).results(work, todo, start) if todo else ()
        for number, row in enumerate(results, start=1 + len(plan.trials) - len(todo)):
            if isinstance(row, Failure):
                point = next(point for point, trial in plan.points.items() if trial.id == row.item.id)
                failures[point] = row.reason
                shown.note(f"failed: {point}: {row.reason}")
            else:
                file.append(row)
            shown.numbers(number, _said(row))
    return Sweep(folder, failures)


def _said(row: Row | Failure[Trial]) -> str:
    """A result in two words, for the progress."""
    if isinstance(row, Failure):
        return "failed"
    return f"last loss {row['val_loss']:.3f}" if row["val_loss"] is not None else str(row["status"])


def representatives(plan: Plan) -> dict[tuple[str, float], Config]:
    """A trial of each method at each size, without the match to a base that is not recorded yet."""
    found: dict[tuple[str, float], Config] = {}
    for point, trial in plan.points.items():
        if (point.method, point.size) not in found:
            config = validate(Config, {**trial.config, "run": {"name": "trial", "tensorboard": False}})
            if trial.needs_base:
                config = config.replace({"function_space.match": None})
            found[point.method, point.size] = config
    return found


def _record_base(plan: Plan, config: SweepConfig, path: Path) -> str:
    """The text of the base file of this plan, made anew each time: a matter of seconds, and of a plan always the same."""
    record(plan.base, config.sweep.base_seeds, "quiet").save(path)
    return path.read_text(encoding="utf-8")
