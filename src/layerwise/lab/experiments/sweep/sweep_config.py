"""The configuration of a sweep: a training run, and a section that says what is varied."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from layerwise.lab.config.schema import Config, Section
from layerwise.lab.config.validate import LARGEST
from layerwise.lab.models.family import Axis

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
