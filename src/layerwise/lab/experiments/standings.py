"""How the contenders of a comparison stand to one another: paired intervals over seeds, tokens, octaves of base rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

from layerwise.lab.experiments.contenders import CompareSection
from layerwise.lab.experiments.tuning import Search
from layerwise.lab.runs.recorded import Run

TOLERANCE = 0.05  # nats: how much worse than its best a base rate may be and still count as a good one


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with half of its 95 % interval by Student's t; NaN where there is one seed."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{self.mean:+.4f} (1 seed)"
        return f"{self.mean:+.4f} \u00b1 {self.half:.4f}"


def paired(losses: Sequence[float], baseline: Sequence[float]) -> Interval | None:
    """The mean difference of runs of the same seeds; None where one has no finite loss.

    Examples:
        >>> print(paired([3.1, 3.3, 3.2], [3.2, 3.4, 3.3]))
        -0.1000 \u00b1 0.0000
    """
    differences = [a - b for a, b in zip(losses, baseline, strict=True)]
    if not all(map(math.isfinite, differences)):
        return None
    count = len(differences)
    if count < 2:
        return Interval(differences[0], math.nan, count)
    from scipy.stats import t  # scikit-learn's; only where intervals are asked for

    half = float(t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)
    return Interval(fmean(differences), half, count)


def tokens_for(loss: float, baseline: Mapping[float, float]) -> str:
    """The length at which the baseline has a loss, between its own runs at several lengths; in the logarithm of the length.

    Args:
        loss: to be reached.
        baseline: length of a run (as a fraction) -> its final loss.

    Examples:
        >>> tokens_for(3.0, {1.0: 3.1, 1.15: 3.05, 1.3: 2.95})
        '1.22'
        >>> tokens_for(2.9, {1.0: 3.1, 1.15: 3.05, 1.3: 2.95})
        'more than 1.3'
    """
    lengths = sorted(baseline)
    if not math.isfinite(loss) or not all(map(math.isfinite, baseline.values())):
        return ""
    for short, long in pairwise(lengths):
        if min(baseline[short], baseline[long]) <= loss <= max(baseline[short], baseline[long]):
            part = (baseline[short] - loss) / ((baseline[short] - baseline[long]) or 1.0)
            return f"{short * (long / short) ** part:.2f}"
    return f"less than {lengths[0]:g}" if loss > baseline[lengths[0]] else f"more than {lengths[-1]:g}"


def baseline(section: CompareSection, searches: Sequence[Search]) -> Search:
    """The contender that the config names, else the one of the lowest loss."""
    best = min(searches, key=lambda search: search.curve.mean(search.best.lr))
    return next((search for search in searches if search.name == section.baseline), best)


def standings(searches: Sequence[Search], base: Search, lengths: Mapping[float, Sequence[Run]]) -> list[dict[str, str]]:
    """Every contender at its best against the baseline, in the order of the searches: title of a column -> cell.

    `lengths`: the baseline's runs of other lengths. A cell is empty for the baseline itself, and where nothing is known.
    """
    expected = base.at_best.final_losses
    curve = {length: fmean(run.final_val_loss for run in runs) for length, runs in lengths.items()}
    curve |= {1.0: fmean(expected)} if curve else {}
    rows = []
    for search in searches:
        losses, other = search.at_best.final_losses, search is not base
        row = {
            "contender": search.label,
            "trials": str(len(search.runs)),
            "at its best": str(search.best),
            "minus baseline, 95 %": str(paired(losses, expected) or "") if other else "",
            "tokens": tokens_for(fmean(losses), curve) if other and curve else "",
            "octaves": search.curve.octaves(TOLERANCE) if len(search.curve.rates) > 1 else "",
        }
        rows.append(row)
    return rows


def standings_note(base: Search, trials: int | None) -> str:
    """What the columns mean."""
    budget = f"Every contender had {trials} trials. " if trials else ""
    return (
        f"{budget}Differences are to {base.label} at its best, of the same seeds, with 95 % intervals; tokens: what"
        " it needs for the same loss, over those of this comparison; octaves: factors of two of base rate within"
        f" {TOLERANCE:g} of the best."
    )
