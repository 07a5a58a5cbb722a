"""An interrupted run goes on bit for bit, whatever moment it was killed at."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import tiny_config, tiny_tree

from layerwise.errors import LayerwiseError
from layerwise.lab.cli import main
from layerwise.lab.config.schema import Config
from layerwise.lab.optimizers.registry import optimizers
from layerwise.lab.runs.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from layerwise.lab.runs.directory import read_run
from layerwise.lab.runs.recorded import Run, read_lines
from layerwise.lab.training.observers import Observer
from layerwise.lab.training.run import train
from layerwise.lab.training.trainer import Trainer

TIMINGS = ("seconds", "tokens_per_second")


class CrashError(Exception):
    pass


class CrashAfter(Observer):
    """Stops the program in the middle of a step, as far as the run can tell; keeps a count across checkpoints."""

    def __init__(self, step: int) -> None:
        self.crash_step, self.seen = step, 0

    def after_step(self, step: int) -> None:
        self.seen += 1
        if step == self.crash_step:
            raise CrashError

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def begin(self, trainer: Any, saved: dict[str, Any] | None) -> None:
        self.seen = saved["seen"] if saved else self.seen


def final_state(run: Path) -> dict[str, Any]:
    return load_checkpoint(list_checkpoints(run / "checkpoints")[0])


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit, all the way down."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.view(torch.uint8) if one.ndim else one, other.view(torch.uint8) if one.ndim else other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def without_timings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    first, second = final_state(one), final_state(other)
    for part in ("step", "model", "optimizer", "scheduler", "random", "loss_sum", "observers"):
        assert same(first[part], second[part]), part
    for stream in ("metrics", "layers"):
        rows = [without_timings(read_lines(run / f"{stream}.jsonl")) for run in (one, other)]
        assert rows[0] == rows[1], stream
    results = [{k: v for k, v in read_run(run).result.items() if k not in TIMINGS} for run in (one, other)]
    assert results[0] == results[1]
    assert read_run(one).status == read_run(other).status == "finished"


def crash(config: Config, step: int) -> None:
    with pytest.raises(CrashError):
        train(config, observers=[CrashAfter(step)], resume=True, or_start=True)


@pytest.mark.parametrize(
    ("name", "stops"),
    [(name, (7,)) for name in optimizers() if name != "lanton"] + [("lanton", (3, 7, 11))],  # 3: before the first checkpoint
)
def test_every_optimizer_resumes_exactly(tmp_path: Path, name: str, stops: tuple[int, ...]) -> None:
    dropout = {"model__resid_pdrop": 0.2, "optimizer__name": name}
    whole = train(tiny_config(tmp_path, run__name="whole", **dropout), observers=[CrashAfter(0)])
    config = tiny_config(tmp_path, run__name="broken", **dropout)
    for step in stops:
        crash(config, step)
    resumed = train(config, observers=[CrashAfter(0)], resume=True)
    assert_same_run(whole.path, resumed.path)


@pytest.mark.parametrize(
    "changes",
    [
        {"training__precision": "bf16"},
        {"training__accumulation": 2, "optimizer__rates": {"reference": "independent"}},
        {
            "optimizer__rates": {"alpha": 0.1, "size_normalised": True, "anchor": "mean"},
            "schedule__name": "wsd",
        },
    ],
)
def test_options_resume_exactly(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {"optimizer__name": "lanton", **changes}
    whole = train(tiny_config(tmp_path, run__name="whole", **changes), observers=[CrashAfter(0)])
    crash(tiny_config(tmp_path, run__name="broken", **changes), 6)
    resumed = train(
        tiny_config(tmp_path, run__name="broken", **changes),
        observers=[CrashAfter(0)],
        resume=True,
    )
    assert_same_run(whole.path, resumed.path)


def test_resuming_what_has_ended_or_not_begun(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(LayerwiseError, match=r"gpt2-tiny-adamw does not exist.*--resume --or-start starts it"):
        train(config, resume=True)
    assert not config.run_path.exists()
    run = train(config, resume=True, or_start=True)
    before = (run.path / "metrics.jsonl").stat().st_mtime_ns
    again = train(config, resume=True)
    assert again.metrics == run.metrics
    assert (run.path / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("words", [{"resume": True, "overwrite": True}, {"or_start": True}])
def test_words_that_contradict_each_other(tmp_path: Path, words: dict[str, bool]) -> None:
    with pytest.raises(LayerwiseError, match="--resume"):
        train(tiny_config(tmp_path), **words)


@pytest.fixture
def broken_run(tmp_path: Path) -> Path:
    """A run stopped at step 10, with checkpoints of steps 4 and 8, and half a last line."""
    crash(tiny_config(tmp_path), 10)
    path = tmp_path / "runs" / "gpt2-tiny-adamw"
    with open(path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step":10,"lo')
    return path


def resume(folder: Path, observers: int = 1, **changes: Any) -> Run:
    watching = [CrashAfter(0) for _ in range(observers)]
    return train(tiny_config(folder, **changes), resume=True, observers=watching)


@pytest.mark.parametrize("damage", ["truncate", "flip", "manifest", "missing"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, broken_run: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tiny_config(tmp_path, run__name="whole"), observers=[CrashAfter(0)])
    newest = list_checkpoints(broken_run / "checkpoints")[0]
    spoil(newest, damage)
    capsys.readouterr()
    resumed = resume(tmp_path)
    notice = capsys.readouterr().err.splitlines()[0]
    assert "step-00000008" in notice
    assert "going on from step-00000004" in notice
    assert_same_run(whole.path, resumed.path)


def spoil(checkpoint: Path, damage: str) -> None:
    state = checkpoint / "state.pt"
    data = bytearray(state.read_bytes())
    if damage == "truncate":
        state.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif damage == "manifest":
        (checkpoint / "manifest.json").write_text('{"format": 1')
    else:
        state.unlink()


def test_when_every_checkpoint_is_damaged(tmp_path: Path, broken_run: Path) -> None:
    for path in list_checkpoints(broken_run / "checkpoints"):
        spoil(path, "truncate")
    with pytest.raises(LayerwiseError, match=r"step-00000008/state\.pt is damaged: it has \d+ bytes of \d+.*--overwrite"):
        resume(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"optimizer__name": "muon", "run__name": "gpt2-tiny-adamw"},
            "optimizer.name was 'adamw', is 'muon'",
        ),
        ({"model__n_embd": 32}, "model.n_embd was 16, is 32"),
        ({"training__seed": 1}, "training.seed was 0, is 1"),
    ],
)
def test_a_checkpoint_of_another_run(tmp_path: Path, broken_run: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LayerwiseError, match=words):
        resume(tmp_path, **changes)
    (broken_run / "run.json").unlink()  # then the checkpoint itself says so
    with pytest.raises(LayerwiseError, match=words):
        resume(tmp_path, **changes)


def test_other_text_and_other_observers(tmp_path: Path, broken_run: Path) -> None:
    with pytest.raises(LayerwiseError, match="with 1 observers, this run has 0"):
        resume(tmp_path, observers=0)
    text = tmp_path / "text.txt"
    text.write_text(text.read_text() + "more")
    with pytest.raises(LayerwiseError, match="trained on another text"):
        resume(tmp_path)


def test_what_may_change(tmp_path: Path, broken_run: Path) -> None:
    shutil.move(tmp_path / "text.txt", tmp_path / "moved.txt")
    (tmp_path / "text.txt").write_text("other text, not named by the config")
    run = resume(tmp_path, data__paths=[str(tmp_path / "moved.txt")], training__keep=1, training__checkpoint_every=5)
    assert run.status == "finished"
    assert len(list_checkpoints(run.path / "checkpoints")) == 1


def test_an_unfinished_checkpoint_is_not_seen(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    good = save_checkpoint(folder, 3, {"x": torch.ones(2)}, {}, keep=2)
    shutil.copytree(good, folder / "step-00000007.tmp")  # killed while it was written
    half_removed = folder / "step-00000001"
    half_removed.mkdir()
    (half_removed / "state.pt").write_bytes(b"x")
    assert list_checkpoints(folder) == [good]
    save_checkpoint(folder, 7, {"x": torch.zeros(2)}, {}, keep=1)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000007"]
    assert torch.equal(load_checkpoint(folder / "step-00000007")["x"], torch.zeros(2))


def mortal(words: list[str], steps: int, part: float) -> None:
    """`main(words)`, which the system ends without warning: after some steps, and then a part of the time they took.

    In this process and its own processor time: on a busy machine one that watched from outside could wake when all is over.
    """
    take, clock = Trainer._train_step, []

    def counted(trainer: Trainer) -> None:
        take(trainer)
        clock.append(time.process_time())
        if len(clock) == steps:
            signal.setitimer(signal.ITIMER_PROF, part * (clock[-1] - clock[0]))

    Trainer._train_step = counted  # type: ignore[method-assign]
    if steps == 0:
        signal.setitimer(signal.ITIMER_PROF, part * 0.1)  # while it starts
    main(words)


def kill_and_resume(tmp_path: Path, kills: int, steps: int) -> None:
    """`layerwise train --resume` in processes of its own, killed without warning, against one that is left alone."""
    tree = tiny_tree(tmp_path)
    tree["model"]["resid_pdrop"] = 0.1
    tree["optimizer"] = {"name": "lanton"}
    tree["training"] |= {"steps": steps, "log_every": 1, "checkpoint_every": 2, "eval_every": 10}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    # A clean server that has torch and transformers loaded, and forks: a process costs milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["layerwise.lab.training.run", "transformers.models.gpt2.modeling_gpt2"])

    def ended(name: str, function: Any, *arguments: Any) -> int | None:
        words = ["train", str(file), f"run.name={name}", "--resume", "--or-start"]
        process = context.Process(target=function, args=(words, *arguments))
        process.start()
        process.join()
        return process.exitcode

    assert ended("whole", main) == 0
    moments = random.Random(0)
    for number in range(kills):
        # Some steps on, and then any moment within as many again: in a step, a record, a checkpoint, the set-up.
        taken = 0 if number == 0 else steps // (2 * kills)
        assert ended("broken", mortal, taken, moments.uniform(0.01, 1)) == -signal.SIGPROF
    assert ended("broken", main) == 0
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "broken")
    started = [json.loads((tmp_path / "runs" / name / "run.json").read_text())["status"] for name in ("whole", "broken")]
    assert started == ["finished", "finished"]


def test_killed_three_times(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=3, steps=60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_ten_times(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=10, steps=300)
