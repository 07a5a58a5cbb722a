"""The benchmark scripts run from end to end, on sizes that say nothing."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

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


def committed(name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a benchmark's results, and the lines of its page but the last, which is the machine's."""
    results = BENCHMARKS / "results"
    rows = [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]
    return rows, (results / f"{name}.md").read_text(encoding="utf-8").splitlines()[:-1]


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

    rows, written = committed("rate_rule")
    assert page(rows).splitlines()[:-1] == written
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


def test_fine_tunings_page_is_made_from_its_rows_and_each_row_was_the_next_of_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fine_tuning
    from rate_rule import as_row

    rows, written = committed("fine_tuning")
    assert fine_tuning.page(rows)[:-1] == written
    for glosses in fine_tuning.PLAN:
        made = [row for row in rows if row["trial"]["glosses"] == glosses]
        for count, row in enumerate(made):
            trial = fine_tuning.due(made[:count], glosses)
            assert trial is not None
            assert as_row(trial) == row["trial"]


def test_fine_tuning_a_small_bert_gives_each_layer_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from transformers import BertConfig, BertForSequenceClassification

    import fine_tuning

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, num_labels=3, **small)
    classes = [[([2 + label, 10 + i % 40, 3], label) for i in range(30)] for label in range(3)]
    task = fine_tuning.Task(lambda: BertForSequenceClassification(config), classes, held_out=30)
    learned, held_out = task.examples(60, seed=0)
    assert sorted(learned + held_out) == sorted(example for examples in classes for example in examples)
    assert held_out == task.examples(60, seed=1)[1]
    for contender in ("AdamW, head x 10", "DualMuon, decay 0.8"):
        found = fine_tuning.train(fine_tuning.Trial(1000, contender, 1e-3, 0), task)
        assert found["steps"] == 3  # one whole batch, three times
        assert 0 <= found["accuracy"] <= 1

    def rates(contender: str) -> dict[str, float]:
        model = task.pretrained()
        trial = fine_tuning.Trial(1000, contender, 1e-3, 0)
        optimizer = fine_tuning.optimizer_of(trial, model, fine_tuning.batch_of(learned))
        of = {p: group["lr"] * group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]}
        return {name: round(1e3 * of[p], 6) for name, p in model.named_parameters()}

    decayed, faster, ours = (rates(name) for name in ("AdamW, decay 0.8", "AdamW, head x 10", "DualMuon, decay 0.8"))
    layers = ("classifier.weight", "bert.pooler.dense.bias", "bert.encoder.layer.1.output.dense.weight")
    below = ("bert.encoder.layer.0.output.LayerNorm.bias", "bert.embeddings.word_embeddings.weight")
    assert [decayed[name] for name in (*layers, *below)] == [1.0, 1.0, 0.8, 0.64, 0.512]
    assert [faster[name] for name in (*layers, *below)] == [10.0, 1.0, 1.0, 1.0, 1.0]
    assert [ours[name] for name in (*layers, *below)] == [3.0, 1.0, 0.8, 0.64, 0.512]


def test_glosses_are_read_without_the_licence_and_examples_of_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fine_tuning

    (tmp_path / "data.noun").write_text('  1 The licence | 9\n00001740 03 n 01 entity 0 000 | that which is; "a thing"  \n')
    (tmp_path / "data.verb").write_text("00001740 29 v 01 breathe 0 000 01 + 02 00 | draw air into the lungs  \n")
    assert fine_tuning.glosses(tmp_path) == {"that which is": "03", "draw air into the lungs": "29"}
