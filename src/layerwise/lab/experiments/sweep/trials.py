"""The trials of a sweep: a training run with a section that says what is varied, and each trial of it a training run with
everything written out, known by the hash of that; how one is run.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import torch
from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from layerwise.errors import LayerwiseError
from layerwise.lab.config.identity import decisive, hashed
from layerwise.lab.config.keys import LARGEST
from layerwise.lab.config.schema import Config, Section
from layerwise.lab.models.families import block_pattern, resized
from layerwise.lab.models.family import Axis
from layerwise.lab.runs.directory import versions
from layerwise.lab.runs.recorded import Run
from layerwise.lab.training.observers import QuietProgress
from layerwise.lab.training.run import complete, train

BASE_FILE = "base.json"
#: One rate for every layer; the base model's function-space rates; equal ones, without a base; rates of hidden matrices and
#: the head times 1/width (muP's for Adam, on the same initialisation).
Method = Literal["standard", "flerm", "uniform", "mup"]


def _geometric(value: Any) -> Any:
    """`{low: 1e-4, high: 1e-1, count: 10}` as that many rates, equal factors apart."""
    if not isinstance(value, dict):
        return value
    try:
        low, high, count = float(value["low"]), float(value["high"]), int(value["count"])
        if set(value) != {"low", "high", "count"} or not 0 < low < high <= LARGEST or not 2 <= count <= 1000:
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("a grid is a list of rates, or {low: 1e-4, high: 1e-1, count: 10}") from None
    factor = (high / low) ** (1 / (count - 1))
    return [float(f"{low * factor**k:.4g}") for k in range(count)]


Grid = Annotated[list[PositiveFloat], BeforeValidator(_geometric), Field(min_length=2)]


class SweepSection(Section):
    """What is varied around the training run."""

    axis: Axis = "width"
    """what the sizes are: `width`, `depth`, `init_scale` or `lora_rank`"""
    sizes: list[float] = Field(min_length=1, default=[32.0, 256.0])
    """hidden sizes, numbers of blocks, initial scales or ranks; the first is the base's"""
    lr: Grid = Field(default_factory=lambda: _geometric({"low": 2**-11, "high": 2**-2, "count": 10}))
    """base learning rates: a list, or {low: , high: , count: }"""
    lr_of: dict[Method, Grid] = Field(default={})
    """grids of single methods (a uniform rate is a change of the outputs, another unit)"""
    methods: list[Method] = Field(default=list(get_args(Method)), min_length=1)
    """of standard, flerm, uniform, mup; mup for widths alone"""
    seeds: list[int] = Field(default=[0, 1], min_length=1)
    """seeds of every trial"""
    base_seeds: list[int] = Field(default=[0, 1, 2, 3], min_length=1)
    """seeds the base rates are averaged over"""
    base_lr: float = Field(default=4e-3, gt=0)
    """rate the base is recorded at: rates are taken per unit of it, and a first step does not depend on it; a
    later one (function_space.match_step) does"""
    loss: Literal["val_loss", "loss"] = "val_loss"
    """what is compared: the last validation loss, or the mean training loss since the line of metrics before
    the last (training.log_every steps)"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("sizes", "lr", "methods", "seeds", "base_seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"sweep.{name}={values}: a value stands in it twice")
        if self.axis != "width" and "methods" not in self.model_fields_set:
            self.methods = [method for method in self.methods if method != "mup"]
        if self.axis != "width" and "mup" in self.methods:
            raise ValueError(f"sweep.methods: mup is a rule for widths, sweep.axis is {self.axis}: leave it out")
        return self

    def grid(self, method: Method) -> list[float]:
        """The base rates of a method, ascending."""
        return sorted(self.lr_of.get(method, self.lr))

    def step_of(self, method: Method) -> float:
        """The factor between neighbours of a method's grid (their geometric mean)."""
        grid = self.grid(method)
        return math.exp(math.log(grid[-1] / grid[0]) / (len(grid) - 1))


class SweepConfig(Config):
    """A sweep. Everything but `sweep` is the training run that is varied."""

    sweep: SweepSection = SweepSection()

    @property
    def run_name(self) -> str:
        """`run.name`, or the model's and the axis's names."""
        return self.run.name or f"sweep-{self.model.preset or self.model.family}-{self.sweep.axis}"


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
