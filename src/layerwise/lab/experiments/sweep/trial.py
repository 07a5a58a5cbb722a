"""One trial, wherever an engine runs it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import Config
from layerwise.lab.experiments.sweep.trial_plan import BASE_FILE, Trial
from layerwise.lab.runs.environment import versions
from layerwise.lab.runs.recorded import Run
from layerwise.lab.training.function_space_observers import quiet_matching
from layerwise.lab.training.run import train


def start_worker(threads: int, wanted: Mapping[str, str]) -> None:
    """Prepares a process for trials. Raises LayerwiseError where it has other versions than are wanted: results of one
    table come from one set. Builds of a version (`+cpu`) count as equal.
    """
    import torch

    found = versions()
    for name, version in wanted.items():
        if found[name].partition("+")[0] != version.partition("+")[0]:
            raise LayerwiseError(
                f"a machine of the sweep has {name} {found[name]}, the one it was started on {version}: install the same"
            )
    torch.set_num_threads(threads)
    quiet_matching()


def run_trial(trial: Trial, base: str | None) -> dict[str, Any]:
    """Trains it in a folder that is removed afterwards and returns its line of the results. `base`: a base file's text."""
    config = Config.model_validate({**trial.config, "run": {"name": "trial", "tensorboard": False}})
    changes: dict[str, Any] = {"training.checkpoint_every": 0}
    with tempfile.TemporaryDirectory() as folder:
        if trial.needs_base:
            assert base is not None
            base_file = Path(folder) / BASE_FILE
            base_file.write_text(base, encoding="utf-8")
            changes["function_space.match"] = str(base_file)
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
        row["matched"] = {name: float(f"{rate['change']:.4g}") for name, rate in matchings[0]["rates"].items()}
    return row


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
