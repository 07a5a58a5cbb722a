"""Nothing lost and nothing silent: foreign files, lost ones, words for numbers, full disks, Ctrl-C, odd names and texts."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fabricated_runs import fabricate
from tiny_run import TEXT, tiny_config, tiny_tree

from layerwise.errors import LayerwiseError
from layerwise.lab.cli import main
from layerwise.lab.config.load import load_config, parse_yaml
from layerwise.lab.config.schema import DataConfig
from layerwise.lab.data.tokens import load_tokens
from layerwise.lab.experiments.comparison import compare
from layerwise.lab.experiments.contenders import CompareConfig
from layerwise.lab.experiments.sweep.sweep_config import SweepConfig
from layerwise.lab.experiments.sweep.trial_plan import make_plan
from layerwise.lab.optimizers.registry import mean_multipliers
from layerwise.lab.report import Contender, load_runs
from layerwise.lab.report.figures.loss import final_losses, loss_curves
from layerwise.lab.report.style import PHONE, Look, styled
from layerwise.lab.report.tables import headline
from layerwise.lab.runs.checkpoint import list_checkpoints
from layerwise.lab.runs.directory import read_run
from layerwise.lab.training.observers import Observer
from layerwise.lab.training.run import complete, train


def call(*words: str) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture(autouse=True)
def _in_the_foreground() -> Iterator[None]:
    """Ctrl-C does what it does on a terminal, where the tests themselves run in the background too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------ whose files these are


@pytest.mark.parametrize(
    "foreign", ["checkpoints/mine.txt", "tensorboard/mine", "metrics.jsonl", "notes.txt"]
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_is_no_run_of_ours_is_left_as_it_is(tmp_path: Path, foreign: str, resume: bool) -> None:
    config = tiny_config(tmp_path, run__name="mine")
    file = config.run_path / foreign
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    with pytest.raises(
        LayerwiseError, match=rf"holds {foreign.split('/')[0]}.*--overwrite, which deletes"
    ) as said:
        train(config, progress="quiet", resume=resume)
    deleted = str(said.value).rpartition("deletes ")[2]
    assert (foreign.split("/")[0] in deleted) == (foreign != "notes.txt")
    assert file.read_text() == "years of work"
    assert [path.name for path in config.run_path.iterdir()] == [foreign.split("/")[0]]


class StopAt(Observer):
    """Ctrl-C, as a terminal sends it, in the middle of a step; or twice."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.at, self.times = step, times

    def after_step(self, step: int) -> None:
        for _ in range(self.times if step == self.at else 0):
            os.kill(os.getpid(), signal.SIGINT)


def stopped(tmp_path: Path, step: int, **changes: Any) -> Path:
    """A run that was interrupted after a step."""
    config = tiny_config(tmp_path, **changes)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress="quiet", observers=[StopAt(step)])
    return config.run_path


def test_a_run_whose_record_was_lost_goes_on_and_does_not_begin_again(tmp_path: Path) -> None:
    path = stopped(tmp_path, 6)
    (path / "run.json").unlink()
    with pytest.raises(LayerwiseError, match="checkpoints/, metrics"):
        train(tiny_config(tmp_path), progress="quiet")
    run = train(tiny_config(tmp_path), progress="quiet", resume=True, observers=[StopAt(0)])
    assert [row["step"] for row in run.metrics] == [0, 2, 4, 5, 6, 8, 10, 12]


def test_deleted_checkpoints_are_not_taken_for_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped(tmp_path, 3)  # before the first one was due
    with pytest.raises(
        LayerwiseError, match=r"came to step 2 and has no checkpoint yet.*--resume --or-start"
    ):
        train(tiny_config(tmp_path), progress="quiet", resume=True)
    train(tiny_config(tmp_path), progress="plain", resume=True, or_start=True)
    assert "has no checkpoint: starting at step 0" in capsys.readouterr().err
    for checkpoint in list_checkpoints(path / "checkpoints"):
        (checkpoint / "manifest.json").unlink()
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**info, "status": "running"}))
    with pytest.raises(LayerwiseError, match=r"came to step 12 and has no checkpoint.*--overwrite"):
        train(tiny_config(tmp_path), progress="quiet", resume=True, or_start=True)


def test_records_that_were_cut_are_said_to_be_and_hold_no_nul(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped(tmp_path, 6)
    metrics = path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:100])
    run = train(tiny_config(tmp_path), progress="plain", resume=True, observers=[StopAt(0)])
    assert "metrics.jsonl is shorter than it was at step 4" in capsys.readouterr().err
    assert b"\0" not in metrics.read_bytes()
    assert run.metrics[-1]["step"] == 12


def test_a_manifest_that_was_made_up_is_one_line(tmp_path: Path) -> None:
    path = stopped(tmp_path, 9)
    for checkpoint in list_checkpoints(path / "checkpoints"):
        (checkpoint / "manifest.json").write_text('{"format": 1, "identity": {"config": []}}')
    with pytest.raises(LayerwiseError, match=r"does not say what it belongs to.*--overwrite"):
        train(tiny_config(tmp_path), progress="quiet", resume=True, observers=[StopAt(0)])


@pytest.mark.parametrize(
    "key", ["name", "status", "config", "versions", "machine", "corpus", "result", "parameters"]
)
def test_an_entry_of_another_kind_in_run_json_is_one_line(tmp_path: Path, key: str) -> None:
    """Found by tests/fuzz: it was a traceback where the entry was read."""
    path = fabricate(tmp_path / "a", "adamw", steps=10, with_layers=False)
    info = json.loads((path / "run.json").read_text())
    for odd in (True, -1, 1e308, [[]] if key != "parameters" else {"a": 1}):
        (path / "run.json").write_text(json.dumps({**info, key: odd}))
        with pytest.raises(LayerwiseError, match=rf"run.json is damaged \({key} is .*--overwrite"):
            read_run(path)


@pytest.mark.parametrize("odd", [None, "", "x", "2026"])
def test_a_run_of_no_known_status_does_not_pass_for_one_that_has_ended(
    tmp_path: Path, odd: str | None
) -> None:
    path = stopped(tmp_path, 6)
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**info, "status": odd}))
    with pytest.raises(LayerwiseError, match=r"run.json is damaged \(status is .*--overwrite"):
        train(tiny_config(tmp_path), progress="quiet", resume=True)


@pytest.mark.parametrize("row", [None, 3, [], {}, {"name": 3}, {"name": "a", "shape": 3}])
def test_a_parameter_table_of_other_rows_is_one_line(tmp_path: Path, row: Any) -> None:
    path = fabricate(tmp_path / "a", "adamw", steps=10, with_layers=False)
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**info, "parameters": [*info["parameters"], row]}))
    with pytest.raises(LayerwiseError, match=r"run.json is damaged \(parameters is "):
        read_run(path)


@pytest.mark.parametrize("key", ["name", "config", "versions", "machine", "corpus", "result", "parameters"])
def test_an_entry_that_is_null_is_one_that_is_not_there(tmp_path: Path, key: str) -> None:
    path = fabricate(tmp_path / "a", "adamw", steps=10, with_layers=False)
    info = json.loads((path / "run.json").read_text())
    runs = []
    for changed in ({**info, key: None}, {k: value for k, value in info.items() if k != key}):
        (path / "run.json").write_text(json.dumps(changed))
        runs.append(read_run(path))
    null, gone = ((run.name, run.config, run.result, list(run.parameters), headline([run])) for run in runs)
    assert null == gone


def test_a_line_whose_layers_are_no_layers_ends_a_record(tmp_path: Path) -> None:
    path = fabricate(tmp_path / "a", "lanton", steps=20, with_function_space=True)
    whole = read_run(path)
    held = {"layers": "layers", "function_space": "rates"}
    for file, key in [*held.items(), *((file, "step") for file in held)]:
        lines = (path / f"{file}.jsonl").read_text().splitlines()
        for odd in (True, "x", [], {"a": 3}):
            odd_line = json.dumps({**json.loads(lines[2]), key: odd})
            (path / f"{file}.jsonl").write_text("\n".join([*lines[:2], odd_line, *lines[3:]]))
            assert getattr(read_run(path), file) == getattr(whole, file)[:2]


# ------------------------------------------------------------------ words on the command line


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["optimizer.lr=5e-2", "optimizer=lanton"], "optimizer.lr", 5e-2),
        (["schedule.final_fraction=0.5", "schedule=wsd"], "schedule.final_fraction", 0.5),
        (["data.seq_len=7", "data=digits"], "data.seq_len", 7),
        (["model.attention=eager", "model=llama-tiny"], "model.attention", "eager"),
        (["parallel.timeout=9", "parallel=fsdp2"], "parallel.timeout", 9.0),
        (["optimizer=lanton", "optimizer.rates.alpha=0.5", "optimizer.rates=noise_adaptive"], "optimizer.rates.alpha", 0.5),
    ],
)  # fmt: skip
def test_a_word_for_a_section_keeps_what_was_set(
    tmp_path: Path, overrides: list[str], key: str, value: object
) -> None:
    found: Any = complete(load_config(None, overrides)).model_dump()
    for part in key.split("."):
        found = found[part]
    assert found == value


def test_a_key_that_then_belongs_to_no_one_is_named() -> None:
    with pytest.raises(LayerwiseError, match=r"`optimizer\.momentum` of adamw"):
        complete(load_config(None, ["optimizer=muon", "optimizer.momentum=0.9", "optimizer=adamw"]))
    with pytest.raises(LayerwiseError, match=r"`model\.n_layer`"):
        complete(load_config(None, ["model.n_layer=2", "model=llama-tiny"]))


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.amsgrad=off", "optimizer.fused=abc", "optimizer.betas={}", "optimizer.eps=true", "optimizer.eps=.nan",
        "training.steps=true", "training.clip_norm=true", "optimizer.lr=1e300", "optimizer.lr=true", "model.n_layer=true",
        "model.n_layer=-1", "model.n_head=-1", "model.n_layer=1e20", "model.n_layer=100000000000", "model.resid_pdrop=off",
        "model.n_layer=20000", "run.name=../../evil", "run.name=a/b", "run.name=..", 'run.name="a\\nb"', "run.dir=\"a\\0\"",
        f"run.name={'x' * 300}", "data.encoding=klingon", "run.tensorboard=off", "training.steps=1" + "0" * 5000,
    ],
)  # fmt: skip
def test_what_no_key_can_mean_is_refused_in_one_line(override: str) -> None:
    with pytest.raises(LayerwiseError) as said:
        complete(load_config(None, [override]))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("override", ["optimizer.rates.size_normalised=no", "optimizer.nesterov=no"])
def test_words_are_no_truths_for_rules_either(override: str) -> None:
    name = "lanton" if "rates" in override else "muon"
    with pytest.raises(LayerwiseError, match="bool"):
        complete(load_config(None, [f"optimizer={name}", override]))


def test_a_short_file_is_not_an_endless_one(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for one, other in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{other}: &{other} [{', '.join([f'*{one}'] * 9)}]\n"
    for text, words in ((bomb, "more than"), ("a: &a [*a]", "more than"), ("[" * 5000, "not valid YAML")):
        file = tmp_path / "bomb.yaml"
        file.write_text(text)
        with pytest.raises(LayerwiseError, match=words):
            load_config(file)
    assert parse_yaml("[1, [2]]", "test") == [1, [2]]


def test_a_grid_of_a_billion_rates_is_refused() -> None:
    with pytest.raises(LayerwiseError, match="a grid is a list of rates"):
        load_config(None, ["sweep.lr={low: 1e-4, high: 1e-1, count: 1e9}"], SweepConfig)


def test_heads_that_do_not_share_a_width_are_one_line() -> None:
    with pytest.raises(LayerwiseError, match="a width of 128 is not a multiple of 148 heads"):
        make_plan(load_config(None, ["model.n_head=148"], SweepConfig))


# ------------------------------------------------------------------ stopped in the middle


def test_ctrl_c_waits_for_whole_records_and_is_written_down(tmp_path: Path) -> None:
    path = stopped(tmp_path, 6, run__tensorboard=True)
    run = read_run(path)
    assert run.status == "running"
    assert run.info["stopped"] == {"step": 6, "reason": "interrupted"}
    assert [row["step"] for row in run.metrics] == [0, 2, 4, 5, 6]  # that of the step it came in too
    whole = train(tiny_config(tmp_path, run__name="whole"), progress="quiet", observers=[StopAt(0)])
    resumed = train(
        tiny_config(tmp_path, run__tensorboard=True), progress="quiet", resume=True, observers=[StopAt(0)]
    )
    assert [row.get("loss") for row in resumed.metrics] == [row.get("loss") for row in whole.metrics]
    assert "stopped" not in resumed.info


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(tmp_path), progress="quiet", observers=[StopAt(6, times=2)])
    assert read_run(tmp_path / "runs" / "gpt2-tiny-adamw").info["stopped"]["step"] == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    save = torch.save
    saved: list[int] = []

    def fill(state: Any, where: Any) -> None:
        saved.append(state["step"])
        if state["step"] == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, where)

    monkeypatch.setattr(torch, "save", fill)
    assert call("train", str(file)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error
    assert "--resume" in error
    path = tmp_path / "runs" / "gpt2-tiny-adamw"
    assert [checkpoint.name for checkpoint in list_checkpoints(path / "checkpoints")] == ["step-00000004"]
    assert read_run(path).info["stopped"]["step"] == 8
    monkeypatch.setattr(torch, "save", save)
    assert call("train", str(file), "--resume") == 0


# ------------------------------------------------------------------ before anything is trained


@pytest.mark.parametrize(
    "contender", ["{name: adamw, betas: [2, 2]}", "{name: adamw, role_factors: {conv: 2}}", "{name: adamw, eps: -1}"]
)  # fmt: skip
def test_a_contender_that_cannot_be_built_ends_a_comparison_before_it_begins(
    tmp_path: Path, contender: str
) -> None:
    tree = tiny_tree(tmp_path)
    tree["compare"] = {"optimizers": ["lanton", "bad"], "contenders": {"bad": yaml.safe_load(contender)}}
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(LayerwiseError):
        compare(load_config(file, schema=CompareConfig), progress="quiet")
    assert not list((tmp_path / "runs").rglob("run.json"))


def test_a_contender_cannot_write_outside(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    tree["compare"] = {"contenders": {"../../evil": {"name": "adamw"}}}
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(LayerwiseError, match="without slashes"):
        compare(load_config(file, schema=CompareConfig), progress="quiet")


# ------------------------------------------------------------------ texts and their cache


def source(file: Path, **more: Any) -> DataConfig:
    return DataConfig(source="files", paths=[str(file)], tokenizer="byte", **more)


def test_the_encoding_of_a_text_is_seen_or_asked_for(tmp_path: Path) -> None:
    text = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 20
    ids = {}
    for encoding in ("utf-8", "utf-16", "utf-32", "latin-1"):
        file = tmp_path / f"{encoding}.txt"
        file.write_text(text, encoding=encoding)
        if encoding == "latin-1":
            with pytest.raises(LayerwiseError, match=r"is not utf-8 text \(byte 0xf6 at 2\).*data\.encoding"):
                load_tokens(source(file))
        ids[encoding] = load_tokens(source(file, encoding="latin-1" if encoding == "latin-1" else None)).train
    assert all((found == ids["utf-8"]).all() for found in ids.values())
    unmarked = tmp_path / "unmarked.txt"
    unmarked.write_text("plain words " * 20, encoding="utf-16-le")
    with pytest.raises(LayerwiseError, match="NUL characters"):
        load_tokens(source(unmarked))


@pytest.mark.parametrize("damage", ["cut", "flip", "no info", "odd info"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    whole = load_tokens(source(file)).train.tolist()
    [folder] = (tmp_path / "cache").glob("tokens-*")
    ids = (folder / "train.bin").read_bytes()
    if damage == "cut":
        (folder / "train.bin").write_bytes(ids[:1001])
    elif damage == "flip":
        (folder / "train.bin").write_bytes(bytes([ids[0] ^ 1]) + ids[1:])
    elif damage == "no info":
        (folder / "info.json").unlink()
    else:
        (folder / "info.json").write_text("[]")
    with pytest.warns(UserWarning, match="made again"):
        assert load_tokens(source(file)).train.tolist() == whole


# ------------------------------------------------------------------ labels


def test_dollars_in_a_name_are_no_formula(tmp_path: Path) -> None:
    [run] = load_runs([fabricate(tmp_path / "a", "adamw", steps=60, with_layers=False)])
    group = Contender(
        r"$\frac{$ and a name that is much too long for the room beside a figure", Look("#1c2127"), (run,)
    )
    with styled():
        for figure in (loss_curves([group, group]), final_losses([group, group], PHONE)):
            figure.draw_without_rendering()


@pytest.mark.parametrize("lost", ["loss", "val_loss", "steps", "seconds"])
def test_a_finished_run_that_lost_its_result_is_one_line(
    tmp_path: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    path = train(load_config(file), progress="quiet").path
    info = json.loads((path / "run.json").read_text())
    del info["result"][lost]
    (path / "run.json").write_text(json.dumps(info))
    assert call("train", str(file), "--resume") == 2
    assert f"does not say with which {lost}" in capsys.readouterr().err


def test_multipliers_of_a_damaged_record_are_the_mean_of_what_there_is(tmp_path: Path) -> None:
    path = fabricate(tmp_path / "a", "lanton", steps=20)
    lines = [json.loads(line) for line in (path / "layers.jsonl").read_text().splitlines()]
    del lines[0]["layers"], lines[1]["layers"]["transformer.wte.weight"]["multiplier"]
    (path / "layers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    info = json.loads((path / "run.json").read_text())
    for row in info["parameters"]:
        del row["units"]
    (path / "run.json").write_text(json.dumps(info))
    whole = [line["layers"]["transformer.wte.weight"]["multiplier"] for line in lines[2:]]
    found = mean_multipliers(str(path))["transformer.wte.weight"]
    assert found == pytest.approx(sum(whole) / len(whole))
    (path / "layers.jsonl").write_text(json.dumps(lines[0]))
    with pytest.raises(LayerwiseError, match="recorded no layer rates"):
        mean_multipliers(str(path))
