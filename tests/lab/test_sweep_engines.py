"""Engines of a sweep: one death takes nothing else with it, and each engine gives the same results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import mortal
import pytest
import yaml
from test_function_space_cli import call
from test_sweep import sweep_config

from layerwise.errors import LayerwiseError
from layerwise.lab.experiments.sweep.engines import ATTEMPTS, Engine, LocalEngine, RayEngine
from layerwise.lab.experiments.sweep.run_sweep import RESULTS, SweepConfig, make_plan, read_results, run_sweep, run_trial
from layerwise.lab.runs.directory import versions


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for this module, which engines use as they find it."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("RAY_ADDRESS", raising=False)
        for limit in ("RAY_gcs_server_port_wait_time_s", "RAY_worker_register_timeout_seconds"):
            patch.setenv(limit, "300")  # its own are 30 and 60 s, too few on a busy machine
        ray.cloudpickle.register_pickle_by_value(mortal)  # which Ray's processes cannot import
        with ExitStack() as stack:
            for attempt in (1, 2, 3):  # the last limit, of 30 s for its own node, cannot be set
                try:
                    stack.enter_context(RayEngine(workers=2)._connected(ray))
                    break
                except LayerwiseError:
                    ray.shutdown()
                    if attempt == 3:
                        raise
            yield


ITEMS = ("raises", "a", "dies once", "dies")


def check_that_one_death_is_one_failure(engine: Engine, folder: Path) -> None:
    found = dict(engine.results(partial(mortal.work, folder=folder), ITEMS))
    failures = {item: row for item, row in found.items() if isinstance(row, str)}
    assert [(item, found[item]) for item in ("a", "dies once")] == [(i, {"item": i}) for i in ("a", "dies once")]
    assert failures.keys() == {"raises", "dies"}
    assert failures["raises"] == "ValueError: 7 is odd"
    assert "died" in failures["dies"] or "killed" in failures["dies"]
    assert [(folder / item).read_text() for item in ("raises", "a", "dies once")] == ["x", "x", "xx"]


def test_a_death_is_one_failure_here(tmp_path: Path) -> None:
    check_that_one_death_is_one_failure(LocalEngine(1), tmp_path)


def test_a_death_is_one_failure_on_ray(ray_here: None, tmp_path: Path) -> None:
    check_that_one_death_is_one_failure(RayEngine(), tmp_path)
    assert (tmp_path / "dies").read_text() == "x" * ATTEMPTS
    with pytest.raises(LayerwiseError, match="--cpus 100 --gpus 0: no machine has as many, there are 2 CPUs"):
        list(RayEngine(cpus=100).results(mortal.work, ["a"]))


def rows(config: SweepConfig, engine: Engine) -> dict[str, Any]:
    """Results without what differs from run to run."""
    assert not run_sweep(config, engine)
    return {id: {**row, "seconds": 0} for id, row in read_results(config.run_path).items()}


def test_ray_gives_the_results_of_this_process(ray_here: None, tmp_path: Path) -> None:
    config = sweep_config(tmp_path, sweep__methods=["flerm"])
    on_ray = config.replace({"run.name": "ray"})
    here = rows(config, LocalEngine(0))
    assert rows(on_ray, RayEngine()) == here
    assert len(here) == 2 * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalEngine, "results", lambda *_: pytest.fail("asked for a result, and all are there"))
        run_sweep(on_ray, LocalEngine(0))

    # Interrupted after two results, under one engine; finished under the other.
    file = on_ray.run_path / RESULTS
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    assert rows(on_ray, LocalEngine(0)) == here
    assert file.read_text().splitlines(keepends=True)[:2] == lines[:2]


def test_failed_trials_are_said_and_left_to_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerwise.lab.experiments.sweep import run_sweep as module

    config = sweep_config(tmp_path, sweep__methods=["standard"], sweep__sizes=[4], sweep__lr=[0.01, 0.1])
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config.model_dump()))
    broken = True

    def sometimes(trial: Any, threads: int, **keywords: Any) -> dict[str, Any]:
        if broken and trial.config["optimizer"]["lr"] == 0.1:
            raise LayerwiseError("no luck")
        return run_trial(trial, threads, **keywords)

    monkeypatch.setattr(module, "run_trial", sometimes)
    words = ("sweep", str(file), "--workers", "0")
    assert call(*words) == 1
    said = capsys.readouterr()
    assert "failed: standard, size 4, lr 0.1, seed 0: no luck" in said.err
    assert "a trial died and gave no result" in said.err
    assert "transfer.png" in said.out
    assert len(read_results(config.run_path)) == 1
    broken = False
    assert call(*words) == 0
    assert len(read_results(config.run_path)) == 2


def test_options_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"workers": 0}, "--workers 0: use 1 or more with --engine ray"),
        ({"gpus": 1.5}, "--gpus 1.5: use a whole number or a fraction below 1"),
        ({"cpus": -1.0}, "--cpus -1: use"),
    ):
        with pytest.raises(LayerwiseError, match=message):
            RayEngine(**options)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LayerwiseError, match=r"pip install 'layerwise\[ray\]'"):
        list(RayEngine().results(mortal.work, ["a"]))
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep_config(tmp_path).model_dump()))
    assert call("sweep", str(file), "--address", "auto") == 2


def test_versions_must_agree(tmp_path: Path) -> None:
    trial = next(iter(make_plan(sweep_config(tmp_path)).trials.values()))
    with pytest.raises(LayerwiseError, match=r"has torch 2[.0-9+a-z]*, the one it was started on 2.12.1: install"):
        run_trial(trial, 1, None, {**versions(), "torch": "2.12.1"})
