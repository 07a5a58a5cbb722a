"""Runs as contenders: which are seeds of one, what tells it from the others, its title, its look, its losses by rate."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from layerwise.common.group_by import group_by
from layerwise.errors import LayerwiseError, warn
from layerwise.lab.config.identity import hashed, identity
from layerwise.lab.config.keys import flatten
from layerwise.lab.optimizers.registry import optimizers
from layerwise.lab.report import style
from layerwise.lab.report.style import CYCLE, MARKERS, Look
from layerwise.lab.runs.directory import RUN_FILE, find_runs, read_run
from layerwise.lab.runs.recorded import Run

MOST_NAMED = 12  # contenders that a figure can name; of more, the best stand out
BEST = 8
_LOOKS = {
    "adamw": Look(style.GREY, "^"),
    "d-muon": Look(style.BLUE, "s"),
    "dual-muon": Look(style.GREEN, "D"),
    "scion": Look(style.AMBER, "P"),
    "lanton": Look(style.VERMILLION, "o"),
    "muon": Look(style.SKY, "p"),
    "torch-muon": Look(style.PURPLE, "v"),
    "signum": Look(style.BROWN, "X"),
}


def optimizer_title(name: str) -> str:
    """As tables and figures write it: what it was registered with, or the name that it has in the run."""
    preset = optimizers().get(name)
    return name if preset is None else preset.title


def looks(optimizers: Sequence[str]) -> list[Look]:
    """A look for each contender, in order: an optimizer's own, else the colour and the marker that fewest have.

    With more contenders than colours two share one, under another marker: 64 looks are told apart.
    """
    chosen = {optimizers.index(name): look for name, look in _LOOKS.items() if name in optimizers}
    for i in sorted(set(range(len(optimizers))) - chosen.keys()):
        colors, markers = Counter(look.color for look in chosen.values()), Counter(look.marker for look in chosen.values())
        free = (look for color in CYCLE for marker in MARKERS if (look := Look(color, marker)) not in chosen.values())
        chosen[i] = min(free, key=lambda look: (colors[look.color], markers[look.marker]), default=Look(CYCLE[0]))
    return [chosen[i] for i in range(len(optimizers))]


@dataclass(frozen=True)
class Contender:
    """Runs that differ by their seed alone, with a label and a look."""

    label: str
    look: Look
    runs: tuple[Run, ...]

    @property
    def final_losses(self) -> list[float]:
        return [run.final_val_loss for run in self.runs]

    @property
    def mean_loss(self) -> float:
        """Of the runs that have a loss and did not diverge; infinite where there is none."""
        return _mean_loss(self.runs)


def _mean_loss(runs: Iterable[Run]) -> float:
    finite = [run.final_val_loss for run in runs if math.isfinite(run.final_val_loss)]
    return fmean(finite) if finite else math.inf


def standing_out(contenders: Sequence[Contender]) -> list[Contender]:
    """All of a few contenders; of many the best, which alone are drawn in colour."""
    if len(contenders) <= MOST_NAMED:
        return list(contenders)
    return sorted((c for c in contenders if math.isfinite(c.mean_loss)), key=lambda c: c.mean_loss)[:BEST]


def load_runs(paths: Iterable[str | Path], note: Callable[[str], None] = warn) -> list[Run]:
    """The runs at these paths; a folder stands for every run below it, less damaged ones, which `note` is told of.

    Raises LayerwiseError where there is none, and for a damaged run that is named itself.
    """
    runs: dict[Path, Run] = {}
    for given in paths:
        named = (Path(given) / RUN_FILE).is_file()
        found = [Path(given)] if named else list(find_runs(given))
        if not found:
            raise LayerwiseError(f"run {given}: no {RUN_FILE} there or below; name a folder that `layerwise train` wrote")
        damaged = []
        for folder in found:
            try:
                runs.setdefault(folder.resolve(), read_run(folder))
            except LayerwiseError as error:
                damaged.append(str(error))
                if named or len(damaged) == len(found):
                    raise
        for message in damaged:
            note(f"left out: {message}")
    if not runs:
        raise LayerwiseError("report: no run was named; name one run directory or more, such as runs/gpt2-tiny-lanton")
    return list(runs.values())


def contenders(runs: Sequence[Run]) -> list[Contender]:
    """Group runs over seeds, and name each group by its optimizer and by what else differs between the groups."""
    groups = list(group_by(runs, lambda run: hashed(_identity(run))).values())
    flat = [_identity(group[0]) for group in groups]
    configs = [flatten(group[0].config) for group in groups]
    titles = [optimizer_title(group[0].optimizer) for group in groups]
    labels = [
        title if titles.count(title) == 1 else f"{title} {_difference(i, titles, flat, configs[i])}".strip()
        for i, title in enumerate(titles)
    ]
    labels = [label if labels.count(label) == 1 else f"{label} ({i + 1})" for i, label in enumerate(labels)]
    best_first = sorted(range(len(groups)), key=lambda i: _mean_loss(groups[i]))  # those that stand out share no colour
    chosen = dict(zip(best_first, looks([groups[i][0].optimizer for i in best_first]), strict=True))
    return [Contender(label, chosen[i], tuple(group)) for i, (label, group) in enumerate(zip(labels, groups, strict=True))]


def _identity(run: Run) -> dict[str, Any]:
    """What the run is apart from its seed: runs of one contender have it in common."""
    corpus = run.info.get("corpus")
    found = identity(run.config, str((corpus or {}).get("sha256", "")))
    found.pop("training.seed", None)
    return found


#: What says most about why two runs differ, first.
_TELLING = (
    "optimizer.lr",
    "optimizer.",
    "model.preset",
    "model.family",
    "model.",
    "schedule.",
    "training.",
    "data.",
    "function_space.",
)
MOST_KEYS = 4


def _difference(i: int, titles: Sequence[str], flat: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    """What tells group `i` from the groups of the same optimizer: the rate first, and what else differs.

    `config`: its own, in which defaults stand too.
    """
    same = [flat[j] for j, title in enumerate(titles) if title == titles[i]]
    keys = {k for group in same for k in group}
    differing = [k for k in keys if len({json.dumps(g.get(k), default=str) for g in same}) > 1]

    def weight(key: str) -> tuple[int, str]:
        return next((n for n, start in enumerate(_TELLING) if key.startswith(start)), len(_TELLING)), key

    def show(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    def apart(keys: Sequence[str]) -> bool:
        return [[g.get(k) for k in keys] for g in same].count([flat[i].get(k) for k in keys]) == 1

    ordered = sorted(differing, key=weight)
    most = MOST_KEYS
    if len(ordered) > MOST_KEYS:  # of many, as models of two kinds have, as few as tell it from the others
        most = next((n for n in range(1, MOST_KEYS) if apart(ordered[:n])), MOST_KEYS)
    values = [
        (k.removeprefix("model.preset").rsplit(".", 1)[-1], show(config.get(k, flat[i].get(k)))) for k in ordered[:most]
    ]
    shown = [f"{key} {value}".strip() for key, value in values]
    more = len(ordered) - len(shown)
    return ", ".join(shown) + (f", {more} more" if more > 0 else "")


class LossesByRate:
    """What is asked of losses on a grid: `losses[lr]` has a value per seed, infinite or NaN for a diverged run."""

    losses: Mapping[float, Sequence[float]]

    def mean(self, lr: float) -> float:
        """Mean over seeds; infinite where any seed diverged or none has finished."""
        values = self.losses[lr]
        return fmean(values) if values and all(map(math.isfinite, values)) else math.inf

    @property
    def rates(self) -> list[float]:
        return sorted(self.losses)

    @property
    def best(self) -> float | None:
        """The rate of the lowest mean loss; None where every rate diverged."""
        rates = [lr for lr in self.rates if math.isfinite(self.mean(lr))]
        return min(rates, key=self.mean) if rates else None

    @property
    def edge(self) -> str | None:
        """`lowest` or `highest` where the best rate is the end of the grid, so that the optimum may lie beyond it.

        The best of the rates that converged is bracketed from above by one that diverged.
        """
        if self.best is None or len(self.rates) < 2:
            return None
        if self.best == self.rates[0]:
            return "lowest"
        return "highest" if self.best == self.rates[-1] else None

    def octaves(self, tolerance: float) -> str:
        """Factors of two of base rate within which the mean loss is within `tolerance` of the best, straight lines between
        points; `at least` as many where the grid ends, or a run diverged, before the loss passed that.
        """
        if self.best is None:
            return "at least 0.0"
        at, limit = self.rates.index(self.best), self.mean(self.best) + tolerance
        (below, opens), (above, opens_too) = (self._reach(rates, limit) for rates in (self.rates[at::-1], self.rates[at:]))
        return f"{'at least ' if opens or opens_too else ''}{below + above:.1f}"

    def _reach(self, rates: Sequence[float], limit: float) -> tuple[float, bool]:
        """Factors of two from the first rate in their direction to where the loss passes the limit, and whether that is
        open.
        """
        for inside, outside in pairwise(rates):
            low, high = self.mean(inside), self.mean(outside)
            if high > limit:
                part = (limit - low) / (high - low)  # 0 where the next one diverged
                width = abs(math.log2(inside / rates[0])) + part * abs(math.log2(outside / inside))
                return width, math.isinf(high)
        return abs(math.log2(rates[-1] / rates[0])), True


@dataclass(frozen=True)
class RateCurve(LossesByRate):
    """A contender's losses on its grid."""

    label: str
    look: Look
    losses: Mapping[float, Sequence[float]]
