"""Training by the command line: losses, weights and recorded rates of tiny runs, whole and killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fingerprint import digest

TEXT = "the quick brown fox jumps over the lazy dog, and then does it again; " * 60
STEPS = 60
OPTIMIZERS = ("adamw", "torch-muon", "muon", "d-muon", "scion", "signum", "lanton", "namo")
MATCHED = ("function_space.match=uniform", "function_space.match_step=2", "function_space.record_every=20")
RUNS = {name: (name, ()) for name in OPTIMIZERS} | {"matched": ("adamw", MATCHED)}


def words(folder: Path, name: str) -> list[str]:
    """The command of a run, written below `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(TEXT, encoding="utf-8")
    optimizer, more = RUNS[name]
    model = [
        "model=gpt2-tiny",
        "model.n_layer=1",
        "model.n_embd=16",
        "model.n_head=2",
        "model.resid_pdrop=0.1",
    ]
    data = ["data.source=files", f"data.paths=[{text}]", "data.tokenizer=byte", "data.seq_len=16"]
    often = [
        "eval_every=20",
        "eval_batches=2",
        "log_every=5",
        "record_every=5",
        "checkpoint_every=10",
        "keep=99",
    ]
    training = [f"training.{key}" for key in (f"steps={STEPS}", "batch_size=4", *often)]
    place = [f"run.dir={folder / 'runs'}", f"run.name={name}", "run.tensorboard=false"]
    rate = [f"optimizer={optimizer}", "optimizer.lr=0.005", "function_space.probes=4"]
    return [sys.executable, "-m", "layerwise", "train", *model, *data, *training, *place, *rate, *more]


def call(command: list[str]) -> None:
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def kill_after(command: list[str], checkpoint: Path) -> None:
    """Start the run and kill it once this checkpoint stands."""
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not checkpoint.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def result(run: Path) -> dict[str, Any]:
    """Weights of the last checkpoint, and the numbers of every stream but the times."""
    last = max((run / "checkpoints").glob("step-*"))
    assert last.name == f"step-{STEPS:08}"
    model = torch.load(last / "state.pt", weights_only=False)["model"]
    found: dict[str, Any] = {"weights": {name: digest(p) for name, p in model.items() if isinstance(p, torch.Tensor)}}
    for stream in ("metrics", "layers", "function_space"):
        path = run / f"{stream}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        timeless = [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]
        found[stream] = digest(json.dumps(timeless, sort_keys=True).replace('"squared_norm"', '"noise"'))  # as recorded
        if stream == "metrics":
            found["loss"] = float(rows[-1]["loss"]).hex()
    return found


def whole(folder: Path, name: str) -> dict[str, Any]:
    call(words(folder, name))
    return result(folder / "runs" / name)


def killed(folder: Path, name: str) -> None:
    kill_after(words(folder, name), folder / "runs" / name / "checkpoints" / "step-00000020")


def resumed(folder: Path, name: str) -> dict[str, Any]:
    call([*words(folder, name), "--resume"])
    return result(folder / "runs" / name)
