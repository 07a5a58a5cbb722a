"""A sweep: a training run with a section that says what is varied; its trials, each a training run with everything written
out, known by the hash of that; running those that have no result yet, and the results: one JSONL file, a line per trial.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self, get_args

import torch
from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from layerwise.errors import LayerwiseError
from layerwise.lab.config.identity import decisive, hashed
from layerwise.lab.config.keys import LARGEST
from layerwise.lab.config.schema import Config, Section
from layerwise.lab.experiments.sweep.engines import Engine, LocalEngine
from layerwise.lab.models.families import block_pattern, resized
from layerwise.lab.models.family import Axis
from layerwise.lab.runs.directory import in_the_way, locked, versions, write_json
from layerwise.lab.runs.recorded import Run, number
from layerwise.lab.training.observers import PlainProgress, QuietProgress, quiet_matching
from layerwise.lab.training.run import check_buildable, complete, record, train

RESULTS, BASE_FILE = "results.jsonl", "base.json"
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
        quiet_matching()
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


def run_sweep(config: SweepConfig, engine: Engine | None = None) -> dict[Point, str]:
    """Runs what is missing: `results.jsonl`, `base.json` and `sweep.json` in the sweep's folder, `config.run_path`.

    A trial that has a result is never repeated, under whichever engine (default `LocalEngine()`): its identity is the
    hash of its whole config, so results stay good when grids or sizes are added. One that dies is reported, leaves no
    result, and so is run again the next time.

    Returns:
        The points whose trial gave no result this time, each with the reason.

    Raises:
        LayerwiseError: for a config that cannot be run.
    """
    plan, folder = make_plan(config), config.run_path
    check_folder(folder)
    failures: dict[Point, str] = {}
    with open_results(folder) as file:
        done = read_results(folder)
        todo = [trial for id, trial in plan.trials.items() if id not in done]
        write_json(folder / "sweep.json", {"config": config.model_dump(), "versions": versions()})
        if not todo:
            return failures
        check_methods(plan)
        base = None
        if any(trial.base is not None for trial in todo):  # made anew each time: of a plan it is always the same
            record(plan.base, config.sweep.base_seeds).save(folder / BASE_FILE)
            base = (folder / BASE_FILE).read_text(encoding="utf-8")
        work = partial(run_trial, base=base, wanted=versions())
        shown, before = PlainProgress(unit="trial"), len(plan.trials) - len(todo)
        shown.start(config.run_name, len(plan.trials), before)
        for ended, (trial, row) in enumerate((engine or LocalEngine()).results(work, todo), start=before + 1):
            if isinstance(row, str):
                point = next(point for point, each in plan.points.items() if each.id == trial.id)
                failures[point] = row
                shown.note(f"failed: {point}: {row}")
                said = "failed"
            else:
                append_result(file, row)
                said = str(row["status"]) if row["val_loss"] is None else f"last loss {row['val_loss']:.3f}"
            shown.numbers(ended, said)
    return failures


def check_methods(plan: Plan) -> None:
    """Builds a trial of every method at every size. Raises LayerwiseError for one that cannot be."""
    first = {(point.method, point.size): trial for point, trial in reversed(plan.points.items())}
    without_base = {"function_space.match": None}  # which is not recorded yet
    check_buildable(trial.alone({} if trial.base is None else without_base) for trial in first.values())


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by trial id. Lines that are none, such as half a last one of a killed process, do not count."""
    path = folder / RESULTS
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("id"), str):
                rows[row["id"]] = row
    return rows


def check_folder(folder: Path) -> None:
    """Raises LayerwiseError where something else than a sweep is in its place."""
    there = in_the_way(folder)
    begun = there == [RESULTS] and not (folder / RESULTS).stat().st_size
    if there and "sweep.json" not in there and not begun and not read_results(folder):
        raise LayerwiseError(
            f"run.name: {folder} holds {', '.join(there[:5])} and no sweep.json, so it is no sweep of ours: it is left"
            " as it is; set another run.name"
        )


def loss_of(row: Mapping[str, Any], key: str) -> float:
    """`loss` or `val_loss` of a result; infinite where the run diverged."""
    value = number(row.get(key))
    return value if row.get("status") == "finished" and math.isfinite(value) else math.inf


@contextmanager
def open_results(folder: Path) -> Iterator[BinaryIO]:
    """The file, locked while it is written to, half a last line cut off.

    Raises LayerwiseError where another process writes this sweep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RESULTS, "ab+") as file:
        if not locked(file):
            raise LayerwiseError(f"sweep {folder}: another process is running it")
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield file


def append_result(file: BinaryIO, row: dict[str, Any]) -> None:
    """One line in one write, on the disk when this returns."""
    file.write(json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
