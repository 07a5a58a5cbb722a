"""Function-space rates in a run and on the command line: record, match, resume, check, sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import call, tiny_tree

from layerwise.function_space import BaseRates
from layerwise.lab.config.keys import validate
from layerwise.lab.config.schema import Config
from layerwise.lab.experiments.check_sizes import check_sizes
from layerwise.lab.runs.checkpoint import list_checkpoints, load_checkpoint
from layerwise.lab.runs.directory import read_run
from layerwise.lab.training.observers import Observer
from layerwise.lab.training.run import train


def decoder_tree(folder: Path, **training: Any) -> dict[str, Any]:
    """A run on text of a decoder of size 8, with a constant rate."""
    tree = tiny_tree(folder)
    tree["model"] = {"preset": "decoder", "base_width": 8, "base_heads": 1, "base_blocks": 1}
    tree["optimizer"] = {"name": "adamw", "lr": 0.01, "weight_decay": 0.0}
    tree["schedule"] = {"name": "constant", "warmup_steps": 0}
    tree["training"] |= training
    return tree


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(decoder_tree(tmp_path)))
    return file


def test_record_on_a_small_model_and_match_a_wide_one(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.json"
    assert call("record", str(config), "-o", str(base), "--seeds", "0,1", "function_space.probes=16") == 0
    assert "step 1: 9 rates" in capsys.readouterr().out
    recorded = BaseRates.load(base)
    assert list(recorded.fingerprint.seeds) == [0, 1]
    assert list(recorded.records) == [0]
    assert all(rate.spread is not None for rate in recorded.at(0).values())

    words = ["train", str(config), "--match", str(base), "model.width=4", "run.name=wide"]
    assert call(*words, "training.steps=5", "function_space.record_every=2", "function_space.probes=16") == 0
    run = read_run(tmp_path / "runs" / "wide")
    [matching] = run.info["matching"]
    assert (matching["step"], matching["base"]) == (1, str(base))
    assert [row["step"] for row in run.function_space] == [1, 3, 5]
    for name, rate in run.function_space[0]["rates"].items():
        # Recorded on other batches and probes than it was matched on. With 16 probes each has an error of about 15 %,
        # batches of 4 x 16 tokens differ by more; a width of 4 unmatched would be off by a factor of 4 in the blocks.
        if name.startswith("blocks"):
            assert rate["value"] == pytest.approx(recorded.at(0)[name].value, rel=0.6), name
        assert matching["rates"][name]["target"] == pytest.approx(recorded.at(0)[name].value, rel=1e-5)
        # Later steps go on at the matched rates.
        assert run.function_space[2]["lrs"][name] == pytest.approx(0.01 * matching["rates"][name]["change"])


def test_recorded_rates_are_those_that_the_steps_took(tmp_path: Path) -> None:
    """Neither the next step's, nor without what FLeRM multiplies them by."""
    tree = decoder_tree(tmp_path, steps=6, log_every=1, record_every=1)
    tree["optimizer"] = {"name": "d-muon", "lr": 0.01}
    tree["schedule"] = {"name": "cosine", "warmup_steps": 3}
    tree["function_space"] = {"match": "uniform", "match_step": 2, "record_every": 1, "probes": 4}
    run = train(validate(Config, tree))
    scheduled = {row["step"]: row["lr"] for row in run.metrics if "lr" in row}
    measured = {row["step"]: row["lrs"] for row in run.function_space}
    assert [row["step"] for row in run.layers] == [1, 2, 3, 4, 5, 6]
    for row in run.layers:
        for unit, rate in row["layers"].items():
            parameter = unit.split("[")[0]
            change = measured[row["step"]][parameter] / measured[1][parameter] * scheduled[1] / scheduled[row["step"]]
            assert rate["lr"] == pytest.approx(scheduled[row["step"]] * change, rel=1e-6)
            assert (change == pytest.approx(1.0)) == (row["step"] == 1)


def test_a_refused_match_leaves_an_older_run_alone(config: Path, tmp_path: Path) -> None:
    assert call("train", str(config), "run.name=kept") == 0
    folder = tmp_path / "runs" / "kept"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert call("train", str(config), "run.name=kept", "--overwrite", "--match", "none.json") == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert call("train", str(config), "run.name=new", "--match", "none.json") == 2
    assert not (tmp_path / "runs" / "new").exists()


def test_a_match_needs_the_bases_rate(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", str(config), "optimizer.lr=null", "--match", "base.json") == 2
    assert "give the rate that the base was recorded with" in capsys.readouterr().err


def test_a_matching_that_could_not_happen_is_refused_before_the_run(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["function_space.probes=4", "function_space.batches=1"]
    once, often = tmp_path / "once.json", tmp_path / "often.json"
    assert call("record", str(config), "-o", str(once), "--seeds", "0", *few) == 0
    every = ["function_space.match_every=2", *few]
    assert call("record", str(config), "-o", str(often), "--seeds", "0", "training.steps=3", *every) == 0
    capsys.readouterr()
    large = ["train", str(config), "run.name=large"]
    for words, message in (
        (
            [*large, "--match", str(once), "training.steps=6", *every],
            "step 3 is to be matched, and base file {once} has only step 1; record the base with"
            " function_space.match_step=1 function_space.match_every=2 and training.steps=5 or more",
        ),
        ([*large, "--match", str(often), "training.steps=5", *every], "step 5 is to be matched"),
        (
            [*large, "--match", str(once), "function_space.match_step=2", *few],
            "step 2 is to be matched, and base file {once} has only step 1; record the base with"
            " function_space.match_step=2 and training.steps=2",
        ),
        (
            [*large, "--match", "uniform", "training.steps=2", "function_space.match_step=50"],
            "function_space.match_step=50 in a run of 2 steps",
        ),
        (
            ["record", str(config), "training.steps=2", "function_space.match_step=5", *every],
            "function_space.match_step=5 in a run of 2 steps",
        ),
    ):
        assert call(*words) == 2
        captured = capsys.readouterr()
        assert message.format(once=repr(str(once))) in captured.err
        assert captured.err.count("\n") == 1
        assert not (tmp_path / "runs" / "large" / "run.json").exists()
    # Every matching that the run reaches is recorded.
    assert call(*large, "--match", str(once), "training.steps=2", *every) == 0
    assert call(*large, "--overwrite", "--match", str(often), "training.steps=4", *every) == 0
    assert [row["step"] for row in read_run(tmp_path / "runs" / "large").info["matching"]] == [1, 3]


def test_an_output_that_cannot_be_written_is_refused_before_training(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_training(*_: Any) -> None:
        raise AssertionError("it trained")

    monkeypatch.setattr("layerwise.lab.training.run.record", no_training)
    for output, message in (
        (tmp_path, "is a folder: name a file, such as"),
        (Path("/dev/null"), "is not a plain file"),
        (config / "base.json", "cannot be written"),
        (Path("/proc/base.json"), "cannot be written"),
    ):
        assert call("record", str(config), "-o", str(output)) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_base_of_a_run_that_diverged_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    changes = [
        f"optimizer={optimizer}",
        "optimizer.lr=1e20",
        "function_space.match_step=6",
        "training.steps=8",
    ]
    output = tmp_path / "base.json"
    assert call("record", str(config), *changes, "schedule=constant", "--seeds", "0", "-o", str(output)) == 2
    message = capsys.readouterr().err
    assert "base-0 diverged after" in message
    assert message.splitlines()[-1].endswith("lower optimizer.lr")
    assert not output.exists()


class StopAfter(Observer):
    """Interrupts a run."""

    def __init__(self, step: int) -> None:
        self.last = step

    def after_step(self, step: int) -> None:
        if step == self.last:
            raise KeyboardInterrupt


class Bystander(Observer):
    """Stands where StopAfter stood: a resumed run has the same number of observers."""


def test_a_matched_and_recorded_run_resumes_exactly(tmp_path: Path) -> None:
    tree = decoder_tree(tmp_path, steps=12, checkpoint_every=4)
    tree["function_space"] = {
        "match": "uniform", "match_step": 3, "record_every": 3, "probes": 4, "batches": 1,
    }  # fmt: skip
    straight, stopped = (
        validate(Config, {**tree, "run": {**tree["run"], "name": name}}) for name in ("straight", "stopped")
    )
    train(straight, observers=[Bystander()])
    with pytest.raises(KeyboardInterrupt):
        train(stopped, observers=[StopAfter(6)])
    train(stopped, observers=[Bystander()], resume=True)
    one, other = (read_run(config.run_path) for config in (straight, stopped))
    assert one.function_space == other.function_space
    assert [row["step"] for row in one.function_space] == [1, 4, 7, 10]
    assert one.info["matching"] == other.info["matching"]
    weights = [load_checkpoint(list_checkpoints(run.path / "checkpoints")[0])["model"] for run in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_recording_does_not_change_a_run(tmp_path: Path) -> None:
    tree = decoder_tree(tmp_path, steps=6)
    losses = []
    for name, every in (("plain", 0), ("recorded", 1)):
        run = {**tree["run"], "name": name}
        settings = {"record_every": every, "probes": 2, "batches": 1}
        losses.append(train(validate(Config, {**tree, "run": run, "function_space": settings})).metrics)
    assert [row.get("val_loss") for row in losses[0]] == [row.get("val_loss") for row in losses[1]]


def test_check_tells_a_plain_model_from_a_matched_one(tmp_path: Path) -> None:
    tree = decoder_tree(tmp_path, batch_size=8)
    tree["function_space"] = {"probes": 24, "batches": 2}
    config = validate(Config, tree)
    plain = check_sizes(config, [8, 16, 32], steps=(1,))
    slopes = {trend.module: trend.slope for trend in plain.of("rate")}
    assert not plain.passed
    # Adam's step of fixed size on every entry: the change of a hidden layer's output grows with its fan-in.
    assert 0.6 < (slopes["blocks.0.mlp.down"] or 0) < 1.4
    matched = check_sizes(config, [8, 16, 32], match="first", steps=(1,), tolerance=0.3)
    assert matched.passed, str(matched)


def test_every_size_is_checked_at_one_rate_and_matched_as_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []

    def note(make_model: Any, sizes: Any, make_optimizer: Any, batch: Any, **options: Any) -> None:
        for size in sizes:
            model = make_model(size)
            [lr] = {group["lr"] for group in make_optimizer(model).param_groups}
            seen.append((model.config.n_embd, lr, options["match"]))

    monkeypatch.setattr("layerwise.lab.experiments.check_sizes.check", note)
    config = validate(Config, {"data": tiny_tree(tmp_path)["data"]})
    check_sizes(config, [64, 128])  # at 128 it is the preset itself, which has a default rate of its own
    config = config.replace({"function_space.match": "uniform"})
    check_sizes(config, [64])
    check_sizes(config, [64], match="base.json")
    lr = 0.002
    assert seen == [(64, lr, None), (128, lr, None), (64, lr, "uniform"), (64, lr, "base.json")]


USER_FILE = """
import torch
from torch import nn

def make(width):
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
    nn.init.normal_(model[4].weight, std=1 / width)
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    return model, OPTIMIZER, (x, x[:, :4].argmax(1))
"""
PLAIN = "torch.optim.Adam(model.parameters(), 1e-3)"
MUP = (
    "torch.optim.Adam([{'params': [model[2].weight, model[4].weight], 'lr': 0.032 / width},"
    " {'params': [*model[0].parameters(), model[2].bias, model[4].bias]}], 1e-3)"
)


def test_check_of_a_users_function_tells_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, optimizer in (("users_plain", PLAIN), ("users_mup", MUP)):
        (tmp_path / f"{name}.py").write_text(USER_FILE.replace("OPTIMIZER", optimizer))
    check = ["--sizes", "32,64,128", "--steps", "1,3"]
    assert call("check", "users_plain:make", *check, "-o", "out/plain") == 1
    out = capsys.readouterr().out
    assert "modules change with the width (function-space rate, slope beyond 0.2): 2" in out
    assert (tmp_path / "out" / "plain.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "plain.csv").read_text().startswith("module,quantity,step,width,value,slope")
    for more in ([], ["--judge", "activation_change"]):
        assert call("check", "users_mup:make", *check, *more) == 0
        out = capsys.readouterr().out
        unclear = out.count("  unclear\n")  # not said to be flat
        assert f"{f'{3 - unclear} of' if unclear else 'all'} 3 modules are flat in the width" in out
        assert ("more seeds or sizes would tell" in out) == bool(unclear)
    assert call("check", "users_plain:make", *check, "--match", "first") == 0
    capsys.readouterr()
    for words, message in (
        (["nowhere:make", "--sizes", "8,16"], "give package.module:function"),
        (["users_plain:made", "--sizes", "8,16"], "has no attribute 'made'"),
        (["users_plain:nn", "--sizes", "8,16"], "is no function"),
        (["users_plain:make", "--sizes", "8,16", "--steps", "1.5"], "--steps '1.5': write whole numbers"),
        (["users_plain:make", "x=1", "--sizes", "8,16"], "set it there"),
    ):
        assert call("check", *words) == 2
        assert message in capsys.readouterr().err


def test_check_and_sweep_exit_codes(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["function_space.probes=8", "function_space.batches=1"]
    assert call("check", str(config), "--sizes", "8,32", "--seeds", "0", "--steps", "1", *few) == 1
    out = capsys.readouterr().out
    assert "grows" in out
    assert "modules change with the width" in out
    assert call("check", str(config), "--sizes", "8,32", "--seeds", "0", "--tolerance", "9", "--steps", "1", *few) == 0
    assert "are flat in the width" in capsys.readouterr().out
    of_a_sweep = ["sweep.axis=depth", "sweep.sizes=[1, 2]"]  # it says what is varied, and was refused
    assert call("check", str(config), *of_a_sweep, "--seeds", "0", "--tolerance", "9", "--steps", "1", *few) == 0
    assert "are flat in the depth" in capsys.readouterr().out
    for words, message in (
        (["check", str(config)], "check needs --sizes"),
        (["check", str(config), "--sizes", "8"], "give at least two"),
        (["check", str(config), "--sizes", "8,twelve"], "write finite numbers with commas"),
        (["check", str(config), "--sizes", "8,nan"], "--sizes '8,nan': write finite numbers"),
        (["check", str(config), "--sizes", "8,16", "--seeds", "1.5"], "--seeds '1.5': write whole numbers"),
        (
            ["check", str(config), "--axis", "heads", "--sizes", "1,2"],
            "axis 'heads' of a config: valid: depth,",
        ),
        (["check", str(config), "--sizes", "8,16", "-o", "."], "is a folder: name a file, such as check"),
        (["record", str(config), "--seeds", "nan"], "--seeds 'nan': write whole numbers"),
        (["record", str(config), "--seeds", "0,0"], "--seeds '0,0': a seed stands there twice"),
        (["check", str(config), "--sizes", "8,12"], "must be a multiple of 8"),
        (["train", str(config), "--match", "none.json"], "none.json' cannot be read (No such file"),
        (["sweep", str(config), "optimizer.lr=null", "sweep.sizes=[8, 9]"], "must be a multiple of 8"),
        (["sweep", str(config)], "leave the key out"),
    ):
        assert call(*words) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1


def test_sweep_command_runs_reports_and_has_nothing_left(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "sweep", str(config), "optimizer.lr=null", "training.steps=2", "run.name=sweep", "sweep.sizes=[8, 16]",
        "sweep.lr=[0.01, 0.1]", "sweep.methods=[standard]", "sweep.seeds=[0]",
    ]  # fmt: skip
    assert call(*words, "--dry-run") == 0
    assert "4 trials, 4 of them to run" in capsys.readouterr().out
    assert call(*words, "--workers", "0") == 0
    assert "the best rate is an end of its grid" in capsys.readouterr().out
    assert call(*words, "--dry-run") == 0
    assert "4 trials, 0 of them to run" in capsys.readouterr().out
    rows = json.loads((tmp_path / "runs" / "sweep" / "table.json").read_text())
    assert [(row["method"], row["size"]) for row in rows] == [("standard", 8), ("standard", 16)]
