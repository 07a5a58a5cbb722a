"""How sure a shift is: an interval by resampling seeds."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from layerwise.lab.report.rate_curve import LossesByRate

#: Resamples are listed where there are at most so many, and drawn beyond.
MOST = 4096
COVERED = 0.95


def best_rates(curve: LossesByRate) -> Counter[float]:
    """How often each rate is best where seeds are drawn with replacement; a seed's losses at all rates stay together.

    Empty with one seed, or where seeds are missing at some rates.
    """
    seeds = {len(values) for values in curve.losses.values()}
    if len(seeds) != 1 or seeds == {1} or not seeds:
        return Counter()
    found: Counter[float] = Counter()
    for chosen in _resamples(seeds.pop()):
        means = {lr: _mean(values, chosen) for lr, values in curve.losses.items()}
        best = min(sorted(means), key=means.__getitem__)
        if math.isfinite(means[best]):
            found[best] += 1
    return found


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
    shifts: Counter[float] = Counter()
    for (start, many), (best, more) in itertools.product(best_rates(base).items(), best_rates(curve).items()):
        shifts[math.log(best / start) / math.log(step)] += many * more
    if not shifts:
        return None
    return _quantile(shifts, (1 - COVERED) / 2), _quantile(shifts, (1 + COVERED) / 2)


def _resamples(seeds: int) -> Iterator[Iterable[int]]:
    if seeds**seeds <= MOST:
        yield from itertools.product(range(seeds), repeat=seeds)
        return
    generator = random.Random(0)
    yield from (generator.choices(range(seeds), k=seeds) for _ in range(MOST))


def _mean(values: Sequence[float], chosen: Iterable[int]) -> float:
    """Infinite where a chosen seed diverged."""
    drawn = [values[seed] for seed in chosen]
    return sum(drawn) / len(drawn) if all(map(math.isfinite, drawn)) else math.inf


def _quantile(counts: Counter[float], part: float) -> float:
    """The smallest value with at least this part of the counts at or below it."""
    needed, below = part * counts.total(), 0
    for value in sorted(counts):
        below += counts[value]
        if below >= needed:
            return value
    return max(counts)
