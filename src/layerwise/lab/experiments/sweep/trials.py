"""The trials of a sweep: each a training run with everything written out, known by the hash of that; how one is run."""

from __future__ import annotations

import itertools
import math
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import LayerwiseError
from layerwise.lab.config.identity import decisive, hashed
from layerwise.lab.config.schema import Config
from layerwise.lab.experiments.sweep.sweep_config import Method, SweepConfig
from layerwise.lab.models.families import block_pattern, resized
from layerwise.lab.runs.environment import versions
from layerwise.lab.runs.recorded import Run
from layerwise.lab.training.progress import QuietProgress
from layerwise.lab.training.run import complete, train

BASE_FILE = "base.json"


@dataclass(frozen=True)
class Point:
    """Where a trial stands in the figure."""

    method: Method
    size: float
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, size {self.size:g}, lr {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Trial:
    """A training run, its `config` as `decisive` gives it; a match to the recorded base names it by its own config."""

    config: dict[str, Any]
    base: dict[str, Any] | None

    @cached_property
    def id(self) -> str:
        """Hash of everything that the result depends on."""
        return hashed([self.config, self.base])[:16]

    def alone(self, changes: dict[str, Any]) -> Config:
        """Its run by itself, with these keys changed."""
        return Config.model_validate({**self.config, "run": {"name": "trial", "tensorboard": False}}).replace(changes)


@dataclass(frozen=True)
class Plan:
    """All points of a sweep with their trials; equal trials of several points are one."""

    points: dict[Point, Trial]
    base: Config

    @property
    def trials(self) -> dict[str, Trial]:
        """By id, the costliest first, so that no process is left alone with it at the end."""
        first: dict[str, Trial] = {}
        for _, trial in sorted(self.points.items(), key=lambda item: -item[0].size):
            first.setdefault(trial.id, trial)
        return first


def make_plan(config: SweepConfig) -> Plan:
    """Every trial, resolved. Raises LayerwiseError where a size cannot be built or a key is wrong."""
    sweep = config.sweep
    for key, value in (("function_space.match", config.function_space.match), ("optimizer.lr", config.optimizer.lr)):
        if value is not None:
            raise LayerwiseError(f"{key}={value} in a sweep: it sets that itself; leave the key out")
    if config.training.eval_every == 0:  # the loss before the first step says where a rate fails
        raise LayerwiseError(
            "training.eval_every=0 in a sweep: it needs the loss before the first step; set 1 or more"
            f" ({config.training.steps}: only before the first step and after the last)"
        )
    plain = Config.model_validate({**config.model_dump(exclude={"sweep"}), "run": {"tensorboard": False}})
    at_size = {size: plain.replace(resized(config.model, sweep.axis, size)) for size in sweep.sizes}
    base = at_size[sweep.sizes[0]].replace({"optimizer.lr": sweep.base_lr})
    identity = {"config": decisive(complete(base)), "seeds": sweep.base_seeds}
    points = {}
    for method, size, seed in itertools.product(sweep.methods, sweep.sizes, sweep.seeds):
        sized = at_size[size].replace({"training.seed": seed, **_method(config, method, size)})
        needed = identity if sized.function_space.match == BASE_FILE else None
        for lr in sweep.grid(method):
            trial = sized.model_copy(update={"optimizer": sized.optimizer.model_copy(update={"lr": lr})})
            points[Point(method, size, lr, seed)] = Trial(decisive(complete(trial)), needed)
    return Plan(points, base)


def _method(config: SweepConfig, method: Method, size: float) -> dict[str, Any]:
    """What a method changes in the config. The base model itself is trained plainly, unless rates are uniform."""
    base = config.sweep.sizes[0]
    if method == "uniform":
        depth = config.function_space.depth
        if config.sweep.axis == "depth" and depth is None:
            depth = {block_pattern(config.model): int(base)}
        return {"function_space.match": "uniform", "function_space.depth": depth}
    if method == "flerm" and size != base:
        return {"function_space.match": BASE_FILE}
    if method == "mup" and size != base:
        return {"optimizer.role_factors": {"hidden": base / size, "head": base / size}}
    return {}


def run_trial(trial: Trial, threads: int, base: str | None, wanted: Mapping[str, str]) -> dict[str, Any]:
    """Trains it in a folder that is removed afterwards and returns its line of the results.

    Args:
        trial: which.
        threads: that this process may use.
        base: a base file's text.
        wanted: versions that this process must have: results of one table come from one set.

    Raises:
        LayerwiseError: it has others. Builds of a version (`+cpu`) count as equal.
    """
    found = versions()
    for name, version in wanted.items():
        if found[name].partition("+")[0] != version.partition("+")[0]:
            raise LayerwiseError(
                f"a machine of the sweep has {name} {found[name]}, the one it was started on {version}: install the same"
            )
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FLeRM left")  # what it leaves alone is in the result
        changes: dict[str, Any] = {"training.checkpoint_every": 0, "run.dir": folder}
        if trial.base is not None:
            assert base is not None
            base_file = Path(folder) / BASE_FILE
            base_file.write_text(base, encoding="utf-8")
            changes["function_space.match"] = str(base_file)
        run = train(trial.alone(changes), progress=QuietProgress())
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
