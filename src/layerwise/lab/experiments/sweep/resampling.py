"""How sure a shift is: an interval by resampling seeds."""

from __future__ import annotations

import itertools
import random

import numpy as np
from numpy.typing import NDArray

from layerwise.lab.report.rate_curve import LossesByRate

#: Resamples are listed where there are at most so many, and drawn beyond.
MOST = 4096
COVERED = 0.95


def best_rates(curve: LossesByRate) -> dict[float, int]:
    """How often each rate is best where seeds are drawn with replacement; a seed's losses at all rates stay together.

    Empty with one seed, or where seeds are missing at some rates. Where no rate has finite losses there is no best.
    """
    seeds = {len(values) for values in curve.losses.values()}
    if len(seeds) != 1 or seeds == {1}:
        return {}
    losses = np.array([curve.losses[lr] for lr in curve.rates])  # [rates, seeds]
    means = np.where(np.isfinite(losses), losses, np.inf)[:, _resamples(seeds.pop())].mean(-1)
    best, counts = np.unique(means.argmin(0)[np.isfinite(means.min(0))], return_counts=True)
    return {curve.rates[number]: int(count) for number, count in zip(best, counts, strict=True)}


def _resamples(seeds: int) -> NDArray[np.int64]:
    """`[resamples, seeds]`"""
    if seeds**seeds <= MOST:
        return np.array([*itertools.product(range(seeds), repeat=seeds)])
    generator = random.Random(0)
    return np.array([generator.choices(range(seeds), k=seeds) for _ in range(MOST)])


def shift_interval(base: LossesByRate, curve: LossesByRate, step: float) -> tuple[float, float] | None:
    """95 % of the shifts, in steps of the grid, where the seeds of both sizes are resampled, each for itself.

    With three seeds that is nearly the range over seeds: an honest width, and no narrower for being flat.

    Args:
        base: losses of the base size.
        curve: losses of the size it is compared with.
        step: factor between neighbours of the grid.

    Returns:
        Ends of the interval; None with one seed.
    """
    starts, bests = best_rates(base), best_rates(curve)
    if not starts or not bests:
        return None
    shifts = np.log(np.divide.outer([*bests], [*starts])).ravel() / np.log(step)
    counts = np.multiply.outer([*bests.values()], [*starts.values()]).ravel()
    order = np.argsort(shifts)
    reached = np.cumsum(counts[order]) / counts.sum()
    low, high = np.searchsorted(reached, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(shifts[order[low]]), float(shifts[order[high]])
