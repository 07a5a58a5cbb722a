"""The trials of a sweep: each a training run with everything written out, known by the hash of that."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.lab.config.identity import decisive, hashed
from layerwise.lab.config.schema import Config
from layerwise.lab.experiments.sweep.sweep_config import Method, SweepConfig
from layerwise.lab.models.families import block_pattern, resized
from layerwise.lab.training.run import complete

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

    @property
    def needs_base(self) -> bool:
        return self.base is not None


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
    for key, value in (
        ("function_space.match", config.function_space.match),
        ("optimizer.lr", config.optimizer.lr),
    ):
        if value is not None:
            raise LayerwiseError(f"{key}={value} in a sweep: it sets that itself; leave the key out")
    if config.training.eval_every == 0:  # the loss before the first step says where a rate fails
        raise LayerwiseError(
            "training.eval_every=0 in a sweep: it needs the loss before the first step; set 1 or more"
            f" ({config.training.steps}: only before the first step and after the last)"
        )
    plain = Config.model_validate({**config.model_dump(exclude={"sweep"}), "run": {"tensorboard": False}})
    base = at_size(plain, config, sweep.sizes[0]).replace({"optimizer.lr": sweep.base_lr})
    identity = {"config": decisive(complete(base)), "seeds": sweep.base_seeds}
    points = {}
    for method, size, seed in itertools.product(sweep.methods, sweep.sizes, sweep.seeds):
        sized = at_size(plain, config, size).replace({"training.seed": seed, **_method(config, method, size)})
        matched = sized.function_space.match == BASE_FILE
        for lr in sweep.grid(method):
            trial = sized.model_copy(update={"optimizer": sized.optimizer.model_copy(update={"lr": lr})})
            needed = identity if matched else None
            points[Point(method, size, lr, seed)] = Trial(decisive(complete(trial)), needed)
    return Plan(points, base)


def at_size(plain: Config, config: SweepConfig, size: float) -> Config:
    """The training run of one size."""
    return plain.replace(resized(config.model, config.sweep.axis, size))


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
