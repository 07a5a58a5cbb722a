"""One trial, in a process of its own or in this one."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from layerwise.lab.config import Config
from layerwise.lab.measuring import quiet_matching
from layerwise.lab.runs import Run
from layerwise.lab.sweep.plan import Trial
from layerwise.lab.train import train


def start_worker() -> None:
    """A worker has one thread: trials run side by side."""
    import torch

    torch.set_num_threads(1)
    quiet_matching()


def run_trial(trial: Trial, base_file: Path) -> dict[str, Any]:
    """Trains it in a folder that is removed afterwards and returns its line of the results."""
    config = Config.model_validate({**trial.config, "run": {"name": "trial", "tensorboard": False}})
    changes: dict[str, Any] = {"training.checkpoint_every": 0}
    if trial.needs_base:
        changes["function_space.match"] = str(base_file)
    with tempfile.TemporaryDirectory() as folder:
        run = train(config.replace({**changes, "run.dir": folder}), progress="quiet")
        return {"id": trial.id, **summary(run)}


def summary(run: Run) -> dict[str, Any]:
    """What a sweep keeps of a run."""
    result = run.result
    row: dict[str, Any] = {
        "status": run.status,
        "loss": _short(result.get("loss")),
        "val_loss": _short(result.get("val_loss")),
        "first_val_loss": _short(run.metrics[0].get("val_loss")) if run.metrics else None,
        "steps": result["steps"],
        "seconds": round(result["seconds"], 2),
    }
    if matchings := run.info.get("matching"):
        row["matched"] = {
            name: float(f"{rate['change']:.4g}") for name, rate in matchings[0]["rates"].items()
        }
    return row


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
