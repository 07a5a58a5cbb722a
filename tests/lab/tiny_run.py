"""The smallest run there is: a fraction of a second, every part of the loop in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerwise.lab.cli import main
from layerwise.lab.config.keys import validate
from layerwise.lab.config.schema import Config

TEXT = "the quick brown fox jumps over the lazy dog, and then does it again; " * 60


def tiny_tree(folder: Path) -> dict[str, Any]:
    """The sections of a run on a text file in `folder`, written there."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(TEXT, encoding="utf-8")
    return {
        "model": {"preset": "gpt2-tiny", "n_layer": 1, "n_embd": 16, "n_head": 2},
        "data": {"source": "files", "paths": [str(text)], "tokenizer": "byte", "seq_len": 16},
        "schedule": {"warmup_steps": 2},
        "training": {
            "steps": 12,
            "batch_size": 4,
            "eval_every": 5,
            "eval_batches": 2,
            "log_every": 2,
            "record_every": 3,
            "checkpoint_every": 4,
        },
        "run": {"dir": str(folder / "runs"), "tensorboard": False},
    }


def tiny_config(folder: Path, **changes: Any) -> Config:
    """That run as a config; changes are written `training__steps=3`."""
    config = validate(Config, tiny_tree(folder))
    return config.replace({key.replace("__", "."): value for key, value in changes.items()})


def call(*words: str) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code
