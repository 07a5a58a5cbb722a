"""Running the trials of a sweep that have no result yet, several at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.lab.base_file import record
from layerwise.lab.record import versions
from layerwise.lab.runs import write_json
from layerwise.lab.sweep.config import SweepConfig
from layerwise.lab.sweep.plan import BASE_FILE, Plan, Trial, make_plan
from layerwise.lab.sweep.progress import SweepProgress
from layerwise.lab.sweep.results import ResultsFile, read_results
from layerwise.lab.sweep.trial import run_trial, start_worker

RESULTS = "results.jsonl"


def run_sweep(config: SweepConfig, workers: int = 2, quiet: bool = False) -> Path:
    """Runs what is missing and returns the sweep's folder: `results.jsonl`, `base.json`, `sweep.json`.

    `workers` processes train one trial each on one thread; 0 trains in this process. A trial that has a result is
    never repeated: its identity is the hash of its whole config, so results stay good when grids or sizes are added.

    Raises LayerwiseError for a config that cannot be run, and where a worker dies.
    """
    if workers < 0:
        raise LayerwiseError(f"--workers {workers}: use 1 or more, or 0 for this process")
    plan, folder = make_plan(config), config.run_path
    with ResultsFile(folder / RESULTS) as file:
        done = read_results(file.path)
        todo = [trial for id, trial in plan.trials.items() if id not in done]
        write_json(folder / "sweep.json", {"config": config.model_dump(), "versions": versions()})
        _record_base(plan, config, folder / BASE_FILE)
        with SweepProgress(config.run_name, len(plan.trials), len(plan.trials) - len(todo), quiet) as shown:
            for row in _results(todo, folder / BASE_FILE, workers):
                file.append(row)
                shown.advance(row)
    return folder


def _record_base(plan: Plan, config: SweepConfig, path: Path) -> None:
    """The base file of this plan, made anew each time: it is a matter of seconds, and of a plan it is always the same."""
    if plan.needs_base:
        record(plan.base, config.sweep.base_seeds, "quiet").save(path)


def _results(trials: list[Trial], base_file: Path, workers: int) -> Iterator[dict[str, Any]]:
    """Results as they come. At most one trial per worker waits, so that an interruption loses little."""
    if workers == 0:
        yield from (run_trial(trial, base_file) for trial in trials)
        return
    waiting = iter(trials)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    try:
        running: set[Future[dict[str, Any]]] = set()
        while True:
            for trial in itertools.islice(waiting, 2 * workers - len(running)):
                running.add(pool.submit(run_trial, trial, base_file))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    except BrokenProcessPool:
        raise LayerwiseError(
            "a worker of the sweep was killed (out of memory?): run the command again to go on, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
