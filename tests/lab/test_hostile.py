"""Nothing lost and nothing silent: foreign files, lost ones, words for numbers, full disks, Ctrl-C, odd names and texts."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fabricated_runs import fabricate
from tiny_run import TEXT, call, tiny_config, tiny_tree

from layerwise.errors import LayerwiseError
from layerwise.lab.config.load import load_config
from layerwise.lab.config.schema import DataConfig
from layerwise.lab.data.tokens import load_tokens
from layerwise.lab.experiments.sweep.run_sweep import loss_of, read_results
from layerwise.lab.optimizers.registry import mean_multipliers
from layerwise.lab.report import Contender, load_runs
from layerwise.lab.report.figures.loss import loss_curves
from layerwise.lab.report.style import PHONE, Look, styled
from layerwise.lab.report.tables import headline
from layerwise.lab.runs.checkpoint import list_checkpoints
from layerwise.lab.runs.directory import read_run
from layerwise.lab.training.observers import Observer
from layerwise.lab.training.run import train


@pytest.fixture(autouse=True)
def _in_the_foreground() -> Iterator[None]:
    """Ctrl-C does what it does on a terminal, where the tests themselves run in the background too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------ whose files these are


@pytest.mark.parametrize("foreign", ["checkpoints/mine.txt", "tensorboard/mine", "metrics.jsonl", "notes.txt"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_is_no_run_of_ours_is_left_as_it_is(tmp_path: Path, foreign: str, resume: bool) -> None:
    config = tiny_config(tmp_path, run__name="mine")
    file = config.run_path / foreign
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    with pytest.raises(LayerwiseError, match=rf"holds {foreign.split('/')[0]}.*--overwrite, which deletes") as said:
        train(config, resume=resume)
    deleted = str(said.value).rpartition("deletes ")[2]
    assert (foreign.split("/")[0] in deleted) == (foreign != "notes.txt")
    assert file.read_text() == "years of work"
    assert [path.name for path in config.run_path.iterdir()] == [foreign.split("/")[0]]


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["record"], "base.json"),
        (["report", "RUN"], "report.html"),
        (["compare"], "report.html"),
        (["check", "--sizes", "8,16", "--steps", "1"], "check.csv"),
        (["check", "--sizes", "8,16", "--steps", "1"], "check.png"),
    ],
)
def test_no_command_writes_over_a_file_of_another_kind(
    tmp_path: Path, words: list[str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    run = fabricate(tmp_path / "a", "adamw", steps=10, with_layers=False)
    output = tmp_path / "out" / file
    output.parent.mkdir()
    output.write_text("years of work")
    command, *more = (str(run) if word == "RUN" else word for word in words)
    inputs = [] if command == "report" else [str(config)]
    where = output.parent if file == "report.html" else output.with_suffix("" if command == "check" else ".json")
    assert call(command, *inputs, *more, "-o", str(where)) == 2
    assert "it is left as it is" in capsys.readouterr().err
    assert output.read_text() == "years of work"
    assert list(output.parent.iterdir()) == [output]
    output.unlink()
    if command != "compare":  # a file of its own is replaced
        assert [call(command, *inputs, *more, "-o", str(where)) in (0, 1) for _ in range(2)] == [True, True]


@pytest.mark.parametrize("foreign", ["results.jsonl", "table.md", "run.json"])
def test_a_sweep_leaves_a_folder_as_it_is_that_is_none_of_its(
    tmp_path: Path, foreign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    mine = tmp_path / "runs" / "mine" / foreign
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    assert call("sweep", str(file), "run.name=mine", "sweep.sizes=[8, 16]", "--workers", "0") == 2
    assert f"holds {foreign} and no sweep.json" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in mine.parent.iterdir()] == [(foreign, "years of work")]


def test_a_damaged_line_of_results_hides_no_other(tmp_path: Path) -> None:
    """Found by hand: what stood after it was run again, and again, and then could not be drawn."""
    file = tmp_path / "results.jsonl"
    row = {"id": "a", "status": "finished", "val_loss": 3.0}
    lines = [json.dumps({**row, "id": name}) for name in "ab"]
    file.write_text("\n".join([lines[0], "xx", "3", '{"id": 3}', lines[1], lines[0][:9]]))
    assert list(read_results(tmp_path)) == ["a", "b"]
    for odd in ("x", None, [], True, float("nan")):
        assert loss_of({**row, "val_loss": odd}, "val_loss") == float("inf")


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
        train(config, observers=[StopAt(step)])
    return config.run_path


def test_a_run_whose_record_was_lost_goes_on_and_does_not_begin_again(tmp_path: Path) -> None:
    path = stopped(tmp_path, 6)
    (path / "run.json").unlink()
    with pytest.raises(LayerwiseError, match="checkpoints/, metrics"):
        train(tiny_config(tmp_path))
    run = train(tiny_config(tmp_path), resume=True, observers=[StopAt(0)])
    assert [row["step"] for row in run.metrics] == [0, 2, 4, 5, 6, 8, 10, 12]


def test_deleted_checkpoints_are_not_taken_for_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stopped(tmp_path, 3)  # before the first one was due
    with pytest.raises(LayerwiseError, match=r"came to step 2 and has no checkpoint yet.*--resume --or-start"):
        train(tiny_config(tmp_path), resume=True)
    train(tiny_config(tmp_path), resume=True, or_start=True)
    assert "has no checkpoint: starting at step 0" in capsys.readouterr().err
    for checkpoint in list_checkpoints(path / "checkpoints"):
        (checkpoint / "manifest.json").unlink()
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**info, "status": "running"}))
    with pytest.raises(LayerwiseError, match=r"came to step 12 and has no checkpoint.*--overwrite"):
        train(tiny_config(tmp_path), resume=True, or_start=True)


def test_records_that_were_cut_are_said_to_be_and_hold_no_nul(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stopped(tmp_path, 6)
    metrics = path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:100])
    run = train(tiny_config(tmp_path), resume=True, observers=[StopAt(0)])
    assert "metrics.jsonl is shorter than it was at step 4" in capsys.readouterr().err
    assert b"\0" not in metrics.read_bytes()
    assert run.metrics[-1]["step"] == 12


def test_a_manifest_that_was_made_up_is_one_line(tmp_path: Path) -> None:
    path = stopped(tmp_path, 9)
    for checkpoint in list_checkpoints(path / "checkpoints"):
        (checkpoint / "manifest.json").write_text('{"format": 1, "identity": {"config": []}}')
    with pytest.raises(LayerwiseError, match=r"does not say what it belongs to.*--overwrite"):
        train(tiny_config(tmp_path), resume=True, observers=[StopAt(0)])


@pytest.mark.parametrize("key", ["name", "status", "config", "versions", "machine", "corpus", "result", "parameters"])
def test_an_entry_of_another_kind_in_run_json_is_one_line(tmp_path: Path, key: str) -> None:
    """Found by tests/fuzz: it was a traceback where the entry was read."""
    path = fabricate(tmp_path / "a", "adamw", steps=10, with_layers=False)
    info = json.loads((path / "run.json").read_text())
    for odd in (True, -1, 1e308, [[]] if key != "parameters" else {"a": 1}):
        (path / "run.json").write_text(json.dumps({**info, key: odd}))
        with pytest.raises(LayerwiseError, match=rf"run.json is damaged \({key} is .*--overwrite"):
            read_run(path)


@pytest.mark.parametrize("odd", [None, "", "x", "2026"])
def test_a_run_of_no_known_status_does_not_pass_for_one_that_has_ended(tmp_path: Path, odd: str | None) -> None:
    path = stopped(tmp_path, 6)
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**info, "status": odd}))
    with pytest.raises(LayerwiseError, match=r"run.json is damaged \(status is .*--overwrite"):
        train(tiny_config(tmp_path), resume=True)


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


# ------------------------------------------------------------------ stopped in the middle


def test_ctrl_c_waits_for_whole_records_and_is_written_down(tmp_path: Path) -> None:
    path = stopped(tmp_path, 6, run__tensorboard=True)
    run = read_run(path)
    assert run.status == "running"
    assert run.info["stopped"] == {"step": 6, "reason": "interrupted"}
    assert [row["step"] for row in run.metrics] == [0, 2, 4, 5, 6]  # that of the step it came in too
    whole = train(tiny_config(tmp_path, run__name="whole"), observers=[StopAt(0)])
    resumed = train(tiny_config(tmp_path, run__tensorboard=True), resume=True, observers=[StopAt(0)])
    assert [row.get("loss") for row in resumed.metrics] == [row.get("loss") for row in whole.metrics]
    assert "stopped" not in resumed.info


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(tmp_path), observers=[StopAt(6, times=2)])
    assert read_run(tmp_path / "runs" / "gpt2-tiny-adamw").info["stopped"]["step"] == 6  # which was taken
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
    assert "KiB are free there" in error
    assert "--resume" in error
    path = tmp_path / "runs" / "gpt2-tiny-adamw"
    assert [checkpoint.name for checkpoint in list_checkpoints(path / "checkpoints")] == ["step-00000004"]
    assert read_run(path).info["stopped"]["step"] == 8
    monkeypatch.setattr(torch, "save", save)
    assert call("train", str(file), "--resume") == 0


# ------------------------------------------------------------------ texts and their cache


def source(file: Path, **more: Any) -> DataConfig:
    return DataConfig(source="files", paths=[str(file)], tokenizer="byte", **more)


def test_a_text_is_utf_8_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    text = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 20
    ids = {}
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"):
        file = tmp_path / f"{encoding}.txt"
        file.write_text(text, encoding=encoding)
        if encoding.startswith("utf-8"):
            ids[encoding] = load_tokens(source(file)).train
        else:
            with pytest.raises(LayerwiseError, match=rf"{encoding}\.txt is not UTF-8 text.*convert it"):
                load_tokens(source(file))
    assert (ids["utf-8"] == ids["utf-8-sig"]).all()
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
    group = Contender(r"$\frac{$ and a name that is much too long for the room beside a figure", Look("#1c2127"), (run,))
    with styled():
        for figure in (loss_curves([group, group]), loss_curves([group, group], PHONE)):
            figure.draw_without_rendering()


@pytest.mark.parametrize("lost", ["loss", "val_loss", "steps", "seconds"])
def test_a_finished_run_that_lost_its_result_is_one_line(
    tmp_path: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    path = train(load_config(file)).path
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
    whole = [line["layers"]["transformer.wte.weight"]["multiplier"] for line in lines[2:]]
    found = mean_multipliers(str(path))["transformer.wte.weight"]
    assert found == pytest.approx(sum(whole) / len(whole))
    (path / "layers.jsonl").write_text(json.dumps(lines[0]))
    with pytest.raises(LayerwiseError, match="recorded no layer rates"):
        mean_multipliers(str(path))


def test_a_terminal_of_few_letters_does_not_end_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by hand: what could not be encoded was a traceback when the work was done."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert call("train", str(file), "run.name=été") == 0
    assert shown.getvalue().startswith(b"?t?: 12 steps")
