"""The benchmark scripts run from end to end, on sizes that say nothing."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from layerwise.geometry.spectral.newton_schulz import PROCESSOR_UNITS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Calls a script's `main` with arguments: a process for each would import torch anew."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()

    def call(script: str, *arguments: str) -> None:
        monkeypatch.setattr("sys.argv", [script, *arguments])
        import_module(script).main()

    yield call
    torch.set_num_threads(threads)


def test_the_optimizer_step_is_measured_and_earlier_sets_are_kept(run: Run, tmp_path: Path) -> None:
    stem = "optimizer_step_cpu" + ("_amx" if "amx_bf16" in PROCESSOR_UNITS else "_bfloat16" if PROCESSOR_UNITS else "")
    common = ["--repeats", "1", "--only", "torch.optim,layerwise", "--out", str(tmp_path)]
    run("optimizer_step", "--sets", "tiny", *common)
    first = (tmp_path / f"{stem}.md").read_text()
    assert "| Muon (layerwise) |" in first
    assert "| noise alone (layerwise) |" in first
    run("optimizer_step", "--sets", "tiny-split", *common)
    both = (tmp_path / f"{stem}.md").read_text()
    assert "## tiny:" in both
    assert "## tiny-split:" in both
    assert (tmp_path / f"{stem}.png").stat().st_size > 0


def test_what_is_asked_of_a_gpu_runs_dry_on_a_cpu(run: Run, tmp_path: Path) -> None:
    run("gpu_checks", "--device", "cpu", "--small", "--out", str(tmp_path))
    page = (tmp_path / "gpu_checks_cpu.md").read_text()
    for words in ("graphs compiled after each", "| 64 |", "| triton_gram |", "noise is", "calls that wait"):
        assert words in page


def test_the_cost_of_nuclear_norms_is_measured(run: Run, tmp_path: Path) -> None:
    run("nuclear_cost", "--small", "--out", str(tmp_path))
    assert "| 3 of 80 x 80 |" in (tmp_path / "nuclear_cost.md").read_text()


def test_the_rate_rules_table_is_made_from_its_rows_and_the_rows_from_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from rate_rule_plan import STUDIES, Trial
    from rate_rule_table import page

    results = BENCHMARKS / "results"
    rows = [json.loads(line) for line in (results / "rate_rule.jsonl").read_text().splitlines()]
    made, written = page(rows), (results / "rate_rule.md").read_text(encoding="utf-8")
    assert made.splitlines()[:-1] == written.splitlines()[:-1]  # the last line is the machine's
    planned = {trial for study in STUDIES.values() for trial in study.trials}
    for row in rows:
        trial = {**row["trial"], "roles": tuple(map(tuple, row["trial"]["roles"]))}
        assert Trial(**trial) in planned


def test_a_plan_counts_what_is_done_and_takes_the_time_of_runs_that_were_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from rate_rule import as_row
    from rate_rule_plan import SECONDS_A_STEP, STUDIES
    from rate_rule_table import plan, seconds_of

    first, *others = STUDIES["small"].trials
    assert seconds_of(first, []) == first.steps * SECONDS_A_STEP["llama-small"]
    rows = [{"trial": as_row(first), "loss": 3.0, "seconds": 500.0}]
    left = len(others) * 500.0  # all have the steps of the first
    counted = ["small", str(1 + len(others)), "1", f"{left:,.0f}"]
    assert plan(["small"], rows).splitlines()[1].split() == counted


def test_the_page_of_when_to_match_is_made_from_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from when_to_match import page
    from when_to_match_runs import Runs

    results = BENCHMARKS / "results"
    made = page(Runs(results / "when_to_match.jsonl"), [0, 1])
    assert made == (results / "when_to_match.md").read_text(encoding="utf-8").splitlines()


def test_the_host_cost_is_measured(run: Run, tmp_path: Path) -> None:
    run("host_cost", "--small", "--out", str(tmp_path))
    assert "| Lanton (layerwise) |" in (tmp_path / "host_cost.md").read_text()


def test_growth_is_measured_within_the_stated_memory(run: Run, tmp_path: Path) -> None:
    run("growth", "--small", "--out", str(tmp_path))
    page = (tmp_path / "growth.md").read_text()
    for words in (
        "With the width",
        "With the layers",
        "With the experts",
        "With the batch",
        "With processes",
    ):
        assert words in page
    assert (tmp_path / "growth.png").stat().st_size > 0


def test_the_rates_on_a_gpu_run_dry_on_a_cpu_and_go_on_where_the_last_call_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_rates
    from rate_rule import Store

    whole = gpu_rates.settings
    monkeypatch.setattr(gpu_rates, "settings", lambda name, size: [trials[:1] for trials in whole(name, size)])
    gpu_rates.prepare(tmp_path, [BENCHMARKS], 60_000, 300)
    store, tokens = Store(tmp_path / "gpu_rates.jsonl"), tmp_path / "tokens.npy"
    gpu_rates.run(store, gpu_rates.SMALL, tokens, "cpu", minutes=0.0)
    assert not store.results()  # nothing that would not be over in time
    store.add(next(gpu_rates.due(gpu_rates.SMALL, [])), {"loss": 1.0, "wall": 0.1, "device": "a", "torch": "b"})
    gpu_rates.run(store, gpu_rates.SMALL, tokens, "cpu", minutes=9.0)
    rows = store.results()
    assert [row["loss"] for row in rows].count(1.0) == 1  # what was there is not repeated
    assert all(row["loss"] is not None for row in rows)
    assert [sum(row["trial"]["seed"] == seed for row in rows) for seed in (1, 2, 3)] == [5, 5, 5]
    page = "\n".join(gpu_rates.page(rows))
    for contender in ("DualMuon", "D-Muon", "D-Muon, AdamW groups x 2", "LANTON", "AdamW"):
        assert f"| {contender} |" in page


def test_on_a_gpu_every_contender_has_as_many_settings_and_its_best_one_is_run_on_more_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_rates
    from rate_rule import as_row

    for name, size in gpu_rates.SIZES.items():
        tried = gpu_rates.settings(name, size)
        assert [len(trials) for trials in tried] == [4] * 5
        best = [trials[2] for trials in tried]
        known = [{"trial": as_row(trial), "loss": 3.0 if trial in best else None} for trials in tried for trial in trials]
        left = list(gpu_rates.due({name: size}, known))
        assert left == [replace(trial, seed=seed) for trial in best for seed in (2, 3)]
