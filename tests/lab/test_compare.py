"""`layerwise compare`: what is run, what is not run again, what is tuned, and what is said about it."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from layerwise.errors import LayerwiseError
from layerwise.lab.cli import main
from layerwise.lab.config.identity import identity
from layerwise.lab.config.keys import nearest
from layerwise.lab.config.load import load_config
from layerwise.lab.experiments import comparison as module
from layerwise.lab.experiments.comparison import compare, paired
from layerwise.lab.experiments.contenders import DEFAULT, CompareConfig, entries
from layerwise.lab.optimizers.registry import base_rates, optimizers
from layerwise.lab.report.grouping import RateCurve
from layerwise.lab.report.style import Look
from layerwise.lab.runs.directory import read_run, write_json
from layerwise.lab.training.observers import QuietProgress
from layerwise.lab.training.run import complete

FAST = [
    "model.n_layer=1", "model.n_embd=16", "model.n_head=2", "data.source=files", "data.tokenizer=byte", "data.seq_len=16",
    "training.batch_size=2", "training.steps=4", "training.log_every=1", "training.eval_every=2", "training.record_every=1",
    "training.eval_batches=1", "schedule.warmup_steps=1", "run.tensorboard=false",
]  # fmt: skip


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text that is long enough\n" for i in range(300)))
    return [*FAST, f"data.paths=[{text}]", f"run.dir={tmp_path / 'runs'}"]


def configured(words: list[str], *more: str) -> CompareConfig:
    return load_config(None, [*words, *more], CompareConfig)


class FakeTraining:
    """Stands for `train`: writes the record of a run whose loss is a parabola in log2 of the rate, and counts.

    A factor of the head costs the square of its distance from 4, in octaves; tokens are worth 0.2 an octave.
    """

    def __init__(self, best: float, diverges_above: float = math.inf, head: float = 0.0) -> None:
        self.best, self.diverges_above, self.head = best, diverges_above, head
        self.rates: list[float] = []

    def __call__(self, config: Any, *, resume: bool, or_start: bool, progress: Any) -> Any:
        config = complete(config)
        path = config.run_path
        assert resume == or_start == path.exists()  # a run that was begun goes on
        if (path / "run.json").exists():
            return read_run(path)
        path.mkdir(parents=True)
        rate = config.optimizer.lr
        self.rates.append(rate)
        diverged = rate > self.diverges_above
        loss = 3 + math.log2(rate / self.best) ** 2 + 0.01 * config.training.seed
        loss += self.head * math.log2(config.optimizer.role_factors.get("head", 1.0) / 4) ** 2
        loss -= 0.2 * math.log2(config.training.steps / 4)
        status = "diverged" if diverged else "finished"
        write_json(
            path / "run.json",
            {"format": 1, "name": path.name, "status": status, "config": config.model_dump()},
        )
        line = {"step": 4, "tokens": 128, "seconds": 1.0, "loss": loss, "val_loss": loss}
        (path / "metrics.jsonl").write_text("" if diverged else json.dumps(line) + "\n")
        return read_run(path)


# ------------------------------------------------------------------ the real thing, small


def test_contenders_share_weights_and_text_and_nothing_runs_twice(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compare", *words, "--optimizers", "adamw,lanton"]
    monkeypatch.setattr("sys.argv", ["layerwise", "compare", "--optimizers", "adamw,lanton"])
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    folder = tmp_path / "runs" / "compare"
    found = {run.config["optimizer"]["name"]: run for run in map(read_run, sorted(folder.glob("*-1")))}
    assert set(found) == {"adamw", "lanton"}
    # Before the first step there is nothing but the initial weights and the text in the validation loss.
    first = [run.metrics[0] for run in found.values()]
    assert first[0]["step"] == 0
    assert first[0]["val_loss"] == first[1]["val_loss"]
    assert len({json.dumps(run.info["corpus"], sort_keys=True) for run in found.values()}) == 1
    assert [run.config["training"]["seed"] for run in found.values()] == [0, 0]
    page = (folder / "report.html").read_text()
    assert "not tuned in this run" in page
    assert "layerwise compare --optimizers adamw,lanton" in page
    output, said_on_the_way = capsys.readouterr()
    assert "has no checkpoint" not in said_on_the_way  # nothing was interrupted
    assert "LANTON" in output
    assert "report.html" in output

    before = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    said: list[str] = []
    compare(configured(words, "compare.optimizers=[adamw, lanton]"), say=said.append)
    assert sum("done before" in line for line in said) == 2
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == before
    adamw = next(path for path in folder.glob("adamw-*"))
    with pytest.raises(SystemExit):
        main(["report", str(adamw)])
    assert (adamw / "report.html").is_file()


def test_an_interrupted_run_goes_on(words: list[str], tmp_path: Path) -> None:
    config = configured(words, "compare.optimizers=[lanton]", "training.checkpoint_every=2")

    real = module.train

    def interrupted(config: Any, **keywords: Any) -> Any:
        class Stopping(QuietProgress):
            def numbers(self, done: int, text: str) -> None:
                if done == 3:
                    raise KeyboardInterrupt

        return real(config, **{**keywords, "progress": Stopping()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    folder = tmp_path / "runs" / "compare"
    assert read_run(folder / "lanton-1").status == "running"
    [lanton], _ = compare(config)
    assert [path.name for path in folder.glob("lanton-*")] == ["lanton-1"]
    run = lanton.runs[0]
    assert run.status == "finished"
    assert [line["step"] for line in run.metrics] == [0, 1, 2, 3, 4]


def test_processes_side_by_side_share_the_contenders_out(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process ended at the run that the first one was at, or made once more what was under way."""
    config = configured(
        words, "compare.optimizers=[adamw, lanton]", "compare.lr_grid.adamw=[1e-3, 2e-3]",
        "compare.by_role=[adamw]", "compare.roles={head: [2]}", "compare.seeds=2",
    )  # fmt: skip
    fake = FakeTraining(best=1e-3)
    made: list[Any] = []
    second: list[Future[Any]] = []
    second_waits = Event()

    def train(given: Any, **keywords: Any) -> Any:
        if not given.run_path.exists():
            made.append(given)
            if len(made) == 1:
                second.append(pool.submit(compare, config, say))
                assert second_waits.wait(60)
        return fake(given, **keywords)

    def say(line: str) -> None:
        if line == "AdamW: another process makes its runs, and is waited for":
            second_waits.set()

    monkeypatch.setattr(module, "train", train)
    with ThreadPoolExecutor() as pool:
        first, _ = compare(config)
        other, _ = second[0].result(timeout=60)
    assert [given.run_path.name for given in made[:3]] == ["adamw-1", "lanton-1", "lanton-2"]  # two by the second one
    assert len({str(identity(given.model_dump())) for given in made}) == len(made)
    assert [c.final_losses for c in other] == [c.final_losses for c in first]


# ------------------------------------------------------------------ grids


def test_an_automatic_grid_grows_until_the_best_lies_inside(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in words if not word.startswith("model.")]  # the preset as it is: its rates
    start = base_rates()["gpt2-tiny"]["rates"]["lanton"]
    fake = FakeTraining(best=start * 8)
    monkeypatch.setattr(module, "train", fake)
    config = configured(words, "compare.optimizers=[lanton]", "compare.lr_grid=auto", "compare.seeds=2")
    found, story = compare(config)
    curve = story.grid[0]
    assert curve.rates == pytest.approx([start * 2.0**k for k in range(-2, 5)])
    assert curve.best == pytest.approx(start * 8)
    assert curve.edge is None
    assert len(found[0].runs) == 2
    assert found[0].final_losses == pytest.approx([3.0, 3.01])
    ran = len(fake.rates)
    compare(config)
    assert len(fake.rates) == ran  # everything was there
    compare(configured(words, "compare.optimizers=[lanton]", "compare.seeds=3"))
    assert fake.rates[ran:] == [start]  # of three seeds at the default rate, two were there from the grid


def test_a_given_grid_is_kept_and_an_optimum_at_its_end_is_said(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train", FakeTraining(best=1e-3, diverges_above=0.1))
    config = configured(
        words,
        "compare.optimizers=[lanton, adamw]",
        "compare.lr_grid.lanton=[4e-3, 2e-3]",
        "compare.lr_grid.adamw=[0.2, 0.4]",
    )
    _, story = compare(config)
    lanton, adamw = story.grid
    assert lanton.rates == [2e-3, 4e-3]
    assert lanton.edge == "lowest"
    assert adamw.best is None
    notes = " ".join(story.notes)
    assert "LANTON: the best rate, 0.002, is the lowest of its grid" in notes
    assert "AdamW: diverged at every rate" in notes


def test_what_is_configured_and_not_compared_is_said(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train", FakeTraining(best=1e-3, diverges_above=0.1))
    contenders = "{slow: {name: d-muon, lr: 1e-4}, quick: {name: adamw}}"
    by_role = [
        "compare.by_role=[quick]",
        "compare.roles={head: [2]}",
    ]  # which is compared, though not by itself
    said: list[str] = []
    config = configured(words, "compare.optimizers=[adamw]", f"compare.contenders={contenders}", *by_role)
    compare(config, say=said.append)
    assert [line for line in said if "leaves out" in line] == [
        "compare.contenders has slow, which this comparison leaves out (compare.optimizers)"
    ]


def test_identity_is_the_config_apart_from_where_it_is_written(words: list[str]) -> None:
    config = configured(words).model_dump(exclude={"compare"})
    moved = json.loads(json.dumps(config))
    moved["run"]["dir"], moved["training"]["keep"] = "elsewhere", 7
    assert identity(moved) == identity(config)
    older = {**config, "data": {**config["data"], "encoding": None}}  # a key that this version has no more
    assert identity(older) == identity(config)
    moved["training"]["seed"] = 1
    assert identity(moved) != identity(config)


def test_contenders_may_be_settings_of_an_optimizer(words: list[str]) -> None:
    config = configured(words, "compare.optimizers=[adamw, calm]", "compare.contenders.calm={name: lanton, lr: 1e-3}")
    found = entries(config)
    assert [(e.name, e.optimizer.name, e.rates) for e in found][1] == ("calm", "lanton", [1e-3])


def test_a_rate_of_zero_is_a_rate(words: list[str]) -> None:
    still = ["compare.optimizers=[still]", "compare.contenders.still={name: lanton, lr: 0}"]
    assert [entry.rates for entry in entries(configured(words, *still))] == [[0.0]]
    with pytest.raises(LayerwiseError, match=r"compare\.contenders\.still\.lr=0: compare\.lr_grid=auto"):
        entries(configured(words, *still, "compare.lr_grid=auto"))


@pytest.mark.parametrize("given", ["fine", "1e-3", "[1e-3, 2e-3]"])
def test_rates_without_a_contender_are_told_how_to_be_given(words: list[str], given: str) -> None:
    with pytest.raises(LayerwiseError, match=r"lr_grid=.*: give auto, or rates by contender such as \{lanton: \["):
        configured(words, f"compare.lr_grid={given}")


def test_a_list_of_optimizers_is_meant_as_it_stands(words: list[str]) -> None:
    calm = "compare.contenders.calm={name: lanton, lr: 1e-3}"
    assert [e.name for e in entries(configured(words, "compare.optimizers=[adamw]", calm))] == ["adamw"]


def test_the_default_contenders_have_tuned_rates_in_the_one_file() -> None:
    for preset, entry in base_rates().items():
        assert set(entry) == {"command", "rates"}, preset
        assert set(entry["rates"]) <= set(optimizers()), nearest(preset, optimizers())
        assert all(rate > 0 for rate in entry["rates"].values())
    assert set(DEFAULT) <= set(base_rates()["gpt2-tiny"]["rates"])
    assert base_rates()["gpt2-tiny"]["command"]


# ------------------------------------------------------------------ equal budgets


def test_a_contender_tuned_by_role_starts_from_the_plain_one_and_finds_the_factors(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTraining(best=2e-3, head=0.1)
    monkeypatch.setattr(module, "train", fake)
    config = configured(
        words, "compare.optimizers=[d-muon]", "compare.lr_grid.d-muon=[1e-3, 2e-3, 4e-3]", "compare.by_role=[d-muon]",
        "compare.roles={head: [0.5, 2, 4, 8], vector: [2]}",
    )  # fmt: skip
    found, story = compare(config)
    plain, tuned = story.standings
    assert plain["at its best"] == "rate 0.002"
    assert tuned["at its best"] == "rate 0.002, head x 4"
    assert (plain["trials"], tuned["trials"]) == ("3", "10")  # the grid; 4 heads, a vector, the 2 rates beside the best
    assert len(fake.rates) == 3 + 4 + 1 + 2  # what both have was made once
    assert [contender.label for contender in found] == ["D-Muon", "D-Muon by role"]
    assert found[1].final_losses == pytest.approx([3.0])
    assert tuned["minus baseline, 95 %"] == ""  # the baseline: the best of them
    assert plain["minus baseline, 95 %"] == "+0.4000 (1 seed)"


def test_what_was_tuned_by_role_with_no_trial_left_for_its_base_rate_says_so(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train", FakeTraining(best=2e-3, head=0.1))
    config = configured(
        words, "compare.optimizers=[d-muon]", "compare.lr_grid.d-muon=[1e-3, 2e-3, 4e-3]", "compare.by_role=[d-muon]",
        "compare.roles={head: [4]}", "compare.trials=4",
    )  # fmt: skip
    _, story = compare(config)
    assert story.standings[1]["at its best"] == "rate 0.002, head x 4"
    assert "D-Muon by role: only one base rate was tried with its best factors" in "".join(story.notes)
    assert "not tuned" not in "".join(story.notes)


def test_every_contender_has_the_same_number_of_trials(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTraining(best=3e-3)
    monkeypatch.setattr(module, "train", fake)
    config = configured(
        words, "compare.optimizers=[d-muon, lanton]", "compare.by_role=[d-muon]", "compare.roles={head: [0.5, 2]}",
        "compare.trials=7", "compare.lr_grid.d-muon=[1e-3, 2e-3]", "compare.lr_grid.lanton=[2e-3, 4e-3]",
    )  # fmt: skip
    _, story = compare(config)
    assert [standing["trials"] for standing in story.standings] == ["7", "7", "7"]
    for curve in story.grid[:2]:
        best = curve.best
        assert best is not None
        assert abs(math.log2(best / 3e-3)) < 0.26  # half-octave points around the best, not the end of the grid
        assert curve.edge is None
    assert "Every contender had 7 trials" in story.notes[-1]


def test_how_contenders_stand_is_said_with_intervals_and_in_tokens(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train", FakeTraining(best=2e-3))
    config = configured(
        words, "compare.optimizers=[d-muon, lanton]", "compare.seeds=3", "compare.baseline=d-muon",
        "compare.lr_grid={d-muon: [2e-3], lanton: [1e-3, 2e-3, 4e-3]}", "compare.lengths=[0.5, 2]",
    )  # fmt: skip
    base, other = compare(config)[1].standings
    assert [*base.values()][3:] == ["", "", ""]
    assert other["minus baseline, 95 %"] == "+0.0000 \u00b1 0.0000"
    assert other["tokens"] == "1.00"
    assert other["octaves"] == "0.1"  # 0.05 of the nat to either neighbour


def test_lengths_that_cannot_be_are_refused_before_anything_is_trained(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained"))
    config = configured(words, "compare.optimizers=[d-muon]", "compare.baseline=d-muon", "compare.lengths=[0.25]")
    with pytest.raises(LayerwiseError, match="warmup_steps=1 in a run of 1 steps"):
        compare(config)


def test_intervals_are_students() -> None:
    # Differences -0.1, -0.2, -0.3: mean -0.2, deviation 0.1; t of 2 degrees of freedom at 97.5 % is 4.3027.
    interval = paired([2.9, 2.8, 2.7], [3.0, 3.0, 3.0])
    assert interval is not None
    assert interval.mean == pytest.approx(-0.2)
    assert interval.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3))
    assert paired([math.inf, 2.8], [3.0, 3.0]) is None


@pytest.mark.parametrize(
    ("losses", "octaves"),
    [
        ([3.5, 3.0, 3.5], "0.2"),  # 0.05 of 0.5 nats an octave, on both sides
        ([3.04, 3.0, 3.01, 3.11], "at least 2.4"),
        ([3.04, 3.0, math.inf], "at least 1.0"),
        ([math.inf, math.inf], "at least 0.0"),
    ],
)
def test_octaves_are_read_off_the_curve(losses: list[float], octaves: str) -> None:
    curve = RateCurve("", Look("", ""), {1e-3 * 2**i: [loss] for i, loss in enumerate(losses)})
    assert curve.octaves(0.05) == octaves


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.optimizers=[lantom]", "did you mean `lanton`"),
        ("compare.optimizers=[adamw, adamw]", "each contender once"),
        ("compare.lr_grid.lantom=[1e-3]", "did you mean `lanton`"),
        ("compare.lr_grid.lanton=[-1]", "greater than 0"),
        ("compare.contenders.x={name: adam}", "did you mean `adamw`"),
        ("compare.contenders.adamw={momentun: 1}", r"`compare\.contenders\.adamw\.momentun`"),
        ("compare.contenders.mine={name: lanton, lr: -1}", r"compare\.contenders\.mine\.lr=-1"),
        (
            "compare.contenders.mine={name: lanton, rates: {alfa: 1}}",
            r"`compare\.contenders\.mine\.rates\.alfa`",
        ),
        ("optimizer.lr=1e-3", "compare.contenders.NAME"),
        ("compare.seedz=2", "did you mean `seeds`"),
        ("compare.baseline=lantom", "did you mean `lanton`"),
        ("compare.lengths=[1.3]", "give compare.baseline too"),
        ("compare={trials: 4, lr_grid: auto}", "AdamW has 5 base rates and factors"),
        ("compare.roles={head: [2]}", "by_role"),
        ("compare={by_role: [d-mun], roles: {head: [2]}}", "did you mean `d-muon`"),
        ("compare={by_role: [d-muon], roles: {head: [-2]}}", "greater than 0"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_trained(words: list[str], override: str, message: str) -> None:
    with pytest.raises(LayerwiseError, match=message):
        entries(configured(words, override))


@pytest.mark.parametrize(
    "arguments",
    [
        ["report"],
        ["report", "nowhere"],
        ["compare", "--optimizers", "lantom"],
        ["compare", "--optimizers", ""],
    ],
)
def test_the_command_line_says_it_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def equal_budgets(words: list[str], *more: str) -> CompareConfig:
    """The committed comparison on a model of next to nothing."""
    committed = Path(__file__).parents[2] / "configs" / "rate-rule-llama-tiny.yaml"
    small = ["model.num_hidden_layers=1", "model.hidden_size=16", "model.intermediate_size=16",
        "model.num_attention_heads=2", "model.num_key_value_heads=1", "compare.seeds=1"]  # fmt: skip
    data = [word for word in words if not word.startswith("model.")]
    return load_config(committed, [*data, *small, *more], CompareConfig)


def test_the_committed_comparison_gives_all_contenders_the_same_budget(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = FakeTraining(best=0.01, head=0.1)
    monkeypatch.setattr(module, "train", training)
    _, made = compare(equal_budgets(words))
    trials = {row["contender"]: row["trials"] for row in made.standings}
    assert trials == {"Dual Muon": "12", "D-Muon": "12", "D-Muon by role": "12"}
    assert made.standings[-1]["at its best"].endswith(", head x 4")  # where the stand-in has its optimum
    assert [bool(row["tokens"]) for row in made.standings] == [True, True, False]  # the baseline is tuned by role


def test_the_committed_comparison_runs_from_end_to_end(words: list[str]) -> None:
    cut = ["compare.lr_grid={d-muon: [0.01], dual-muon: [0.01]}", "compare.roles={head: [2]}",
        "compare.trials=2", "compare.lengths=[1.3]"]  # fmt: skip
    found, story = compare(equal_budgets(words, *cut))
    assert all(run.status == "finished" for contender in found for run in contender.runs)
    assert all(math.isfinite(loss) for curve in story.grid for at in curve.losses.values() for loss in at)
