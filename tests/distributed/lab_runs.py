"""What the processes of a test cluster run of the lab: the same small training run at any world size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from layerwise.errors import LayerwiseError
from layerwise.lab.config.keys import validate
from layerwise.lab.config.schema import Config
from layerwise.lab.runs.checkpoint import list_checkpoints, load_checkpoint
from layerwise.lab.runs.directory import read_run
from layerwise.lab.training.run import train
from layerwise.lab.training.trainer import Trainer

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class CrashError(Exception):
    pass


@contextmanager
def stopping_after(step: int) -> Iterator[None]:
    """Stops the program after a step, as far as the run can tell."""
    real = Trainer._train_step

    def take_step(trainer: Trainer) -> None:
        real(trainer)
        if trainer.step + 1 == step:
            raise CrashError

    with mock.patch.object(Trainer, "_train_step", take_step):
        yield


def tree(folder: Path) -> dict[str, Any]:
    """A run of ten steps on 8 x 16 tokens a step, more than any matrix has rows or columns but the vocabulary's."""
    text = folder / "text.txt"
    if not text.exists():
        generator = torch.Generator().manual_seed(0)  # of random letters, so that gradients have full rank
        letters = torch.randint(97, 123, (6000,), generator=generator).tolist()
        text.write_text("".join(map(chr, letters)), encoding="utf-8")
    return {
        "model": {"preset": "gpt2-tiny", "n_layer": 2, "n_embd": 8, "n_head": 2},
        "data": {"source": "files", "paths": [str(text)], "tokenizer": "byte", "seq_len": 16},
        "optimizer": {"name": "lanton"},
        "schedule": {"warmup_steps": 2},
        "training": {
            "steps": 10,
            "batch_size": 8,
            "clip_norm": 0.5,
            "eval_every": 5,
            "eval_batches": 2,
            "log_every": 2,
            "record_every": 2,
            "checkpoint_every": 3,
        },
        "run": {"dir": str(folder / "runs"), "tensorboard": False},
    }


def config(folder: Path, changes: dict[str, Any]) -> Config:
    return validate(Config, tree(folder)).replace(changes)


def lab_run(folder: str, changes: dict[str, Any], crash_after: int = 0, resume: bool = False) -> str:
    """Trains in float64, where the order of sums is all that differs; how it ended: its status, or its error."""
    if not dist.is_initialized():
        for name in LAUNCHED:
            os.environ.pop(name, None)
    os.environ["LAYERWISE_CACHE"] = str(Path(folder) / "cache")
    torch.set_default_dtype(torch.float64)
    try:
        with stopping_after(crash_after):
            run = train(config(Path(folder), changes), resume=resume, or_start=resume)
    except CrashError:
        return "crashed"
    except LayerwiseError as error:
        return str(error)
    finally:
        torch.set_default_dtype(torch.float32)
    return run.status


def results(folder: Path, name: str) -> dict[str, Any]:
    """What a run left on the disk: its last weights and optimizer state, and every number it recorded."""
    run = read_run(folder / "runs" / name)
    state = load_checkpoint(list_checkpoints(run.path / "checkpoints")[0])
    return {"state": state, "metrics": run.metrics, "layers": run.layers, "info": run.info}
