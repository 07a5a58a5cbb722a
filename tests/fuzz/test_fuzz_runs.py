"""Run folders that were changed by hand or by a disk: a report, or a run that goes on, or one line."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from cases import Share, cases, one_line, run
from hypothesis import strategies as st

from layerwise.errors import LayerwiseError
from layerwise.lab.config.keys import validate
from layerwise.lab.config.schema import Config
from layerwise.lab.report import Story, contenders, load_runs, tables
from layerwise.lab.report.page import plans
from layerwise.lab.report.page import warnings as said_of
from layerwise.lab.report.style import PHONE, styled
from layerwise.lab.training.observers import Observer
from layerwise.lab.training.run import train

TEXT = "the quick brown fox jumps over the lazy dog, and then does it again; " * 60
FILES = ["run.json", "metrics.jsonl", "layers.jsonl", "function_space.jsonl", "checkpoints/step-00000002/manifest.json",
         "checkpoints/step-00000002/state.pt", "checkpoints/step-00000004/manifest.json",
         "checkpoints/step-00000004/state.pt"]  # fmt: skip
odd = st.sampled_from([None, True, -1, 1e308, "", "x", "NaN", [], {}, [[]], {"a": 1}, "2026", float("nan")])


class Stop(Observer):
    def after_step(self, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt


def config(folder: Path) -> Config:
    text = folder / "text.txt"
    text.write_text(TEXT)
    return validate(Config, {
        "model": {"preset": "decoder", "base_width": 4, "base_heads": 1, "base_blocks": 1},
        "data": {"source": "files", "paths": [str(text)], "tokenizer": "byte", "seq_len": 8},
        "optimizer": {"name": "lanton"},
        "training": {"steps": 6, "batch_size": 2, "eval_every": 2, "eval_batches": 1, "log_every": 1, "record_every": 2,
                     "checkpoint_every": 2},
        "function_space": {"record_every": 3, "probes": 1, "batches": 1},
        "run": {"dir": str(folder / "runs"), "name": "a", "tensorboard": False},
    })  # fmt: skip


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 5, and the text it reads."""
    folder = tmp_path_factory.mktemp("pristine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERWISE_CACHE", str(folder / "cache"))
        with pytest.raises(KeyboardInterrupt):
            train(config(folder), observers=[Stop()])
    return folder


def spoil(path: Path, how: tuple[str, float, Any]) -> None:
    """Cuts the file, changes bytes of it, or puts something else where a value stood."""
    kind, where, value = how
    content = path.read_bytes()
    at = int(where * max(0, len(content) - 1))
    if kind == "cut":
        path.write_bytes(content[:at])
    elif kind == "gone":
        path.unlink()
    elif kind == "bytes" or path.suffix == ".pt":
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55] if content else b"") + content[at + 1 :])
    else:
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        number = int(where * max(0, len(lines) - 1))
        tree = json.loads(lines[number])
        nodes = [tree]
        for node in nodes:
            nodes += [item for item in node.values() if isinstance(item, dict) and item]
        node = nodes[int(where * 997) % len(nodes)]
        key = sorted(node)[int(where * 9973) % len(node)]
        if value is None:
            del node[key]
        else:
            node[key] = value
        lines[number] = json.dumps(tree)
        path.write_text("\n".join(lines) + "\n")


hows = st.tuples(st.sampled_from(["cut", "gone", "bytes", "value", "value", "value"]), st.floats(0, 1), odd)


def report(pristine: Path, folder: Path, file: str, how: tuple[str, float, Any]) -> None:
    shutil.rmtree(folder / "runs", ignore_errors=True)
    shutil.copytree(pristine / "runs", folder / "runs")
    spoil(folder / "runs" / "a" / file, how)
    try:
        groups = contenders(load_runs([folder / "runs"]))
    except LayerwiseError:
        return
    runs = [run for group in groups for run in group.runs]
    for made in (tables.headline(runs), tables.result_rows(groups), tables.parameter_rows(runs), tables.settings(groups),
                 tables.facts(runs, "versions"), tables.facts(runs, "corpus"), said_of(runs)):  # fmt: skip
        assert made is not None
    with styled():
        for plan in plans(groups, Story()):
            plan.draw(PHONE)


@cases(short=8, long=500)
def test_a_report_of_a_spoiled_run(pristine: Path, tmp_path: Path, share: Share) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(
            share,
            report,
            pristine=st.just(pristine),
            folder=st.just(tmp_path),
            file=st.sampled_from(FILES[:4]),
            how=hows,
        )


def resume(pristine: Path, folder: Path, file: str, how: tuple[str, float, Any]) -> None:
    shutil.rmtree(folder / "runs", ignore_errors=True)
    shutil.copytree(pristine / "runs", folder / "runs")
    path = folder / "runs" / "a"
    spoil(path / file, how)
    try:
        ended = train(config(folder), resume=True)
    except LayerwiseError as error:
        one_line(error)
        return
    assert ended.status in ("finished", "diverged")
    assert b"\0" not in (path / "metrics.jsonl").read_bytes()


@cases(short=8, long=1000)
def test_a_spoiled_run_goes_on_or_says_why_not(pristine: Path, tmp_path: Path, share: Share) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(
            share,
            resume,
            pristine=st.just(pristine),
            folder=st.just(tmp_path),
            file=st.sampled_from(FILES),
            how=hows,
        )
