"""Running the trials of a sweep that have no result yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from layerwise.lab.experiments.sweep.engines import Engine, Failure, LocalEngine
from layerwise.lab.experiments.sweep.results import RESULTS, append_result, check_folder, open_results, read_results
from layerwise.lab.experiments.sweep.sweep_config import SweepConfig
from layerwise.lab.experiments.sweep.trials import BASE_FILE, Point, make_plan, run_trial, start_worker
from layerwise.lab.runs.directory import write_json
from layerwise.lab.runs.environment import versions
from layerwise.lab.training.progress import PlainProgress
from layerwise.lab.training.run import check_buildable, record


@dataclass(frozen=True)
class Sweep:
    """Where the results are, and the points whose trial gave none this time, each with the reason."""

    folder: Path
    failures: Mapping[Point, str]


def run_sweep(config: SweepConfig, engine: Engine | None = None) -> Sweep:
    """Runs what is missing: `results.jsonl`, `base.json` and `sweep.json` in the sweep's folder.

    A trial that has a result is never repeated, under whichever engine (default `LocalEngine()`): its identity is the
    hash of its whole config, so results stay good when grids or sizes are added. One that dies is reported, leaves no
    result, and so is run again the next time.

    Raises LayerwiseError for a config that cannot be run.
    """
    plan, folder = make_plan(config), config.run_path
    check_folder(folder)
    failures: dict[Point, str] = {}
    with open_results(folder / RESULTS) as file:
        done = read_results(folder / RESULTS)
        todo = [trial for id, trial in plan.trials.items() if id not in done]
        if todo:
            first = {(point.method, point.size): trial for point, trial in reversed(plan.points.items())}
            without_base = {"function_space.match": None}  # which is not recorded yet
            check_buildable(trial.alone({} if trial.base is None else without_base) for trial in first.values())
        write_json(folder / "sweep.json", {"config": config.model_dump(), "versions": versions()})
        base = None
        if any(trial.base is not None for trial in todo):  # made anew each time: of a plan it is always the same
            record(plan.base, config.sweep.base_seeds).save(folder / BASE_FILE)
            base = (folder / BASE_FILE).read_text(encoding="utf-8")
        work = partial(run_trial, base=base)
        start = partial(start_worker, wanted=versions())
        shown = PlainProgress(unit="trial")
        shown.start(config.run_name, len(plan.trials), len(plan.trials) - len(todo))
        results = (engine or LocalEngine()).results(work, todo, start) if todo else ()
        for number, row in enumerate(results, start=1 + len(plan.trials) - len(todo)):
            if isinstance(row, Failure):
                point = next(point for point, trial in plan.points.items() if trial.id == row.item.id)
                failures[point] = row.reason
                shown.note(f"failed: {point}: {row.reason}")
                said = "failed"
            else:
                append_result(file, row)
                said = str(row["status"]) if row["val_loss"] is None else f"last loss {row['val_loss']:.3f}"
            shown.numbers(number, said)
    return Sweep(folder, failures)
