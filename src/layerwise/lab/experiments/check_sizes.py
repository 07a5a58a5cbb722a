"""Do the layers' updates change the outputs as much at every size? The counterpart of muP's coordinate check.

A model is built in several sizes, each takes a few optimizer steps, and the function-space rate of every parameter's
last step is measured. Rates that grow or shrink with the size are why a learning rate does not carry over.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from layerwise.errors import LayerwiseError
from layerwise.function_space import Rates
from layerwise.lab.config.schema import Config
from layerwise.lab.experiments.record_base import record
from layerwise.lab.models.families import resized
from layerwise.lab.models.family import Axis
from layerwise.lab.training.function_space_observers import MatchRates, RecordRates, quiet_matching
from layerwise.lab.training.run import complete, take_steps

FIRST = "first"


@dataclass(frozen=True)
class Trend:
    """One parameter's rates over the sizes; the slope of their logarithms against the size's and its standard error.

    A rate that is 0 at every size has no slope.
    """

    name: str
    rates: Sequence[float]
    slope: float | None
    stderr: float

    def flat(self, tolerance: float) -> bool:
        """Whether the slope may be within the tolerance, at 95 % confidence."""
        return self.slope is None or abs(self.slope) <= tolerance + 1.96 * self.stderr


@dataclass(frozen=True)
class SizeCheck:
    """Rates per parameter (of the names that all sizes share) at each size."""

    sizes: Sequence[float]
    trends: Sequence[Trend]
    tolerance: float

    @property
    def passed(self) -> bool:
        return all(trend.flat(self.tolerance) for trend in self.trends)


def check_sizes(
    config: Config,
    sizes: Sequence[float],
    *,
    axis: Axis = "width",
    match: str | None = None,
    step: int = 1,
    seeds: Sequence[int] = (0,),
    tolerance: float = 0.2,
) -> SizeCheck:
    """Realised rates of step `step` at each size, averaged over seeds, and their trend.

    match: a base file, `uniform`, or `first`: the first size's own rates, recorded here; None: what the config's
    `function_space.match` says. tolerance: the largest slope
    of log rate against log size that counts as flat. Raises LayerwiseError.
    """
    if len(set(sizes)) < 2:
        raise LayerwiseError(f"sizes {list(sizes)}: give at least two, such as --widths 64,128,256")
    if step < 1:
        raise LayerwiseError(f"step {step}: use 1 or more")
    quiet_matching()
    config = complete(config)  # a preset's default rate is that of one size: all sizes take the same
    match = match if match is not None else config.function_space.match
    with tempfile.TemporaryDirectory() as folder:
        if match == FIRST:
            match = str(Path(folder) / "base.json")
            record(_at(config, axis, sizes[0], seeds[0]), seeds, "quiet").save(match)
        measured = [
            _mean([_rates(_at(config, axis, size, seed), match, step) for seed in seeds]) for size in sizes
        ]
    names = [name for name in measured[0] if all(name in rates for rates in measured)]
    return SizeCheck(
        sizes, [_trend(name, sizes, [rates[name] for rates in measured]) for name in names], tolerance
    )


def _at(config: Config, axis: Axis, size: float, seed: int) -> Config:
    changes = {"training.seed": seed, "training.eval_every": 0, "run.tensorboard": False}
    return config.replace({**resized(config.model, axis, size), **changes})


def _rates(config: Config, match: str | None, step: int) -> Rates:
    """The rates of a fresh model's step `step`."""
    settings = config.function_space.model_copy(update={"match": match})
    config = config.model_copy(update={"function_space": settings})
    matcher = None if match is None else MatchRates(settings, step)
    recorder = RecordRates(settings, max(1, step - 1), matcher)
    take_steps(config, step, [recorder] if matcher is None else [recorder, matcher])
    if not recorder.recorder.records:
        raise LayerwiseError(
            f"step {step} moved no weight: set schedule.warmup_steps=0 or a higher optimizer.lr"
        )
    return recorder.recorder.records[-1].rates


def _mean(several: Sequence[Rates]) -> dict[str, tuple[float, float]]:
    """Each parameter's rate and its standard error, averaged over seeds."""
    return {
        name: (
            fmean(rates[name].value for rates in several),
            math.hypot(*(rates[name].stderr for rates in several)) / len(several),
        )
        for name in several[0]
    }


def _trend(name: str, sizes: Sequence[float], rates: Sequence[tuple[float, float]]) -> Trend:
    """The least-squares slope of log rate over log size, with the error that the rates' errors give it."""
    values = [value for value, _ in rates]
    if not any(values):
        return Trend(name, values, None, 0.0)
    if not all(value > 0 for value in values):
        return Trend(name, values, math.inf, 0.0)
    x = [math.log(size) for size in sizes]
    weights = [a - fmean(x) for a in x]
    weights = [weight / sum(w * w for w in weights) for weight in weights]
    slope = sum(w * math.log(value) for w, value in zip(weights, values, strict=True))
    # 0 where there is no error to speak of: `exact`, or a single probe.
    errors = [w * stderr / value for w, (value, stderr) in zip(weights, rates, strict=True)]
    stderr = math.hypot(*errors)
    return Trend(name, values, slope, stderr if math.isfinite(stderr) else 0.0)


def rows(check: SizeCheck) -> list[tuple[str, ...]]:
    """For a table: a parameter, its rates at each size, their slope, and a word where it is not flat."""
    made = []
    for trend in check.trends:
        slope = "" if trend.slope is None else f"{trend.slope:+.2f} ± {trend.stderr:.2f}"
        mark = "" if trend.flat(check.tolerance) else "grows" if (trend.slope or 0) > 0 else "shrinks"
        made.append((trend.name, *(f"{rate:.3g}" for rate in trend.rates), slope, mark))
    return made
