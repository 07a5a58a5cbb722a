"""Compare optimizers: the same model, initial weights and batches for each, at given rates or each at its best of a grid.

Runs lie side by side in one folder and are found again by their config (`Runner.place`): one that has ended is never
repeated, one that was interrupted goes on, whatever the command that asks for it. Processes that make one comparison side
by side share its contenders out. How they stand to one another: paired intervals over seeds, tokens, octaves of base rate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

from layerwise.errors import LayerwiseError
from layerwise.lab.config.identity import hashed, identity
from layerwise.lab.config.keys import validate
from layerwise.lab.config.schema import Config
from layerwise.lab.experiments.contenders import CompareConfig, CompareSection, Point, Search, entries
from layerwise.lab.optimizers.registry import base_rates, plain_preset
from layerwise.lab.report import Contender, Story
from layerwise.lab.runs.directory import claimed, find_runs, has_ended, read_run
from layerwise.lab.runs.recorded import Run
from layerwise.lab.training.observers import PlainProgress
from layerwise.lab.training.run import check_buildable, complete, train

TOLERANCE = 0.05  # nats: how much worse than its best a base rate may be and still count as a good one


class Runner:
    """Trains the runs of a comparison that are missing; `say` is told in a line what was there."""

    def __init__(self, config: CompareConfig, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self._paths: dict[str, Path] = {}

    @contextmanager
    def alone_with(self, entry: Search, wait: bool = True) -> Iterator[bool]:
        """Whether no other process makes runs of the contender until the block ends; those that are there are known then.

        Contenders of one optimizer (tuned by role, and plain) have runs in common: they are one work.
        """
        work = hashed(entry.optimizer.model_dump(exclude={"lr"}))
        with claimed(self.config.run_path, work, wait) as free:
            for path in find_runs(self.config.run_path):
                with suppress(LayerwiseError):  # not a run we could use; its folder's name stays taken
                    self._paths[hashed(identity(read_run(path).config))] = path
            yield free

    def shared_out(self, searches: Sequence[Search]) -> Iterator[Search]:
        """The searches one after the other; those that another process is at come last, when it is done with them."""
        taken: list[Search] = []
        for search in searches:
            with self.alone_with(search, wait=False) as free:
                if free:
                    yield search
                else:
                    taken.append(search)
        for search in taken:
            self.say(f"{search.label}: another process makes its runs, and is waited for")
            with self.alone_with(search):
                yield search

    def runs(self, entry: Search, point: Point, length: float = 1.0) -> list[Run]:
        """A run per seed of the contender at a point; `length`: a fraction of the comparison's steps."""
        first, seeds = self.config.training.seed, self.config.compare.seeds
        return [self._run(entry, point, length, seed) for seed in range(first, first + seeds)]

    def _run(self, entry: Search, point: Point, length: float, seed: int) -> Run:
        placed = self.place(self.config_of(entry, point, length, seed), entry.name)
        title = f"{entry.label}, {point}"
        if length != 1.0:
            title += f", {length:g} of the length"
        if self.config.compare.seeds > 1:
            title += f", seed {seed}"
        ended, begun = has_ended(placed.run_path), placed.run_path.exists()
        # One that was stopped before its first checkpoint loses nothing by starting again.
        run = train(placed, resume=begun, or_start=begun, progress=PlainProgress(title))
        if ended:
            loss = run.final_val_loss
            known = f", validation loss {loss:.4f}" if math.isfinite(loss) else ""
            self.say(f"{title}: done before, {run.status}{known}")
        return run

    def place(self, config: Config, stem: str) -> Config:
        """The config with the directory of its run: the one it has already, or a free one named after `stem`."""
        key = hashed(identity(complete(config).model_dump()))
        if key not in self._paths:
            numbered = (self.config.run_path / f"{stem}-{number}" for number in itertools.count(1))
            self._paths[key] = next(p for p in numbered if not p.exists() and p not in self._paths.values())
        path = self._paths[key]
        return config.replace({"run.dir": str(path.parent), "run.name": path.name})

    def config_of(self, entry: Search, point: Point, length: float = 1.0, seed: int | None = None) -> Config:
        """The run of one seed, without a place."""
        tree = self.config.model_dump(exclude={"compare"})
        own = entry.optimizer.role_factors
        factors = own | {role: own.get(role, 1.0) * factor for role, factor in point.factors}
        tree["optimizer"] = {**entry.optimizer.model_dump(), "lr": point.lr, "role_factors": factors}
        tree["training"] |= {"seed": self.config.training.seed if seed is None else seed, "keep": 1}
        if length != 1.0:
            tree["training"]["steps"] = round(length * self.config.training.steps)
        return validate(Config, tree)

    def examples(self, entry: Search) -> Iterator[Config]:
        """A run of the contender, of every length, and one with a factor for every role that it is tuned by."""
        for length in (1.0, *self.config.compare.lengths):
            yield self.config_of(entry, Point(entry.rates[0]), length)
        for role in entry.roles:
            yield self.config_of(entry, Point(entry.rates[0], ((role, 2.0),)))


def compare(config: CompareConfig, say: Callable[[str], None] = lambda _: None) -> tuple[list[Contender], Story]:
    """Runs what is missing of a comparison. `say` is told in a line what happens.

    Returns:
        Each contender at its best; all losses by rate, how they stand, and what to note.

    Raises:
        LayerwiseError: before anything is trained, where the config cannot be run.
    """
    section, searches = config.compare, entries(config)
    trials = [section.trials or len(search.rates) for search in searches]
    total = sum(trials) * section.seeds
    say(f"{total} run{'s' if total != 1 else ''} of {config.training.steps} steps, {config.tokens_per_step:,} tokens a step")
    compared = {search.name for search in searches} | set(section.by_role)
    for key, given in (("lr_grid", section.lr_grid), ("contenders", section.contenders)):
        if isinstance(given, dict) and (unused := sorted(given.keys() - compared)):
            say(f"compare.{key} has {', '.join(unused)}, which this comparison leaves out (compare.optimizers)")
    runner = Runner(config, say)
    check_buildable(example for search in searches for example in runner.examples(search))
    for search in runner.shared_out(searches):
        for point in search.points(say):
            if point not in search.runs:
                search.runs[point] = runner.runs(search, point)
    story = Story("Comparison of optimizers", list(notes(config, searches)), grid=[search.curve for search in searches])
    if story.tuned or section.seeds > 1 or section.baseline is not None:
        base = baseline(section, searches)
        with runner.alone_with(base):
            lengths = {length: runner.runs(base, base.best, length) for length in section.lengths}
        note = standings_note(base, section.trials)
        story = replace(story, standings=standings(searches, base, lengths), notes=[*story.notes, note])
    return [search.at_best for search in searches], story


def notes(config: CompareConfig, searches: Sequence[Search]) -> Iterator[str]:
    """What a reader has to know before the numbers: how the rates were chosen."""
    if all(len(search.runs) == 1 for search in searches):
        yield _of_defaults(base_rates().get(plain_preset(config.model) or "", {}).get("command"))
        return
    seeds = config.compare.seeds
    yield (
        f"Each optimizer is shown at the best base rate of its grid, over {seeds} seed{'s' if seeds > 1 else ''}, all "
        "runs with the same schedule length. The rate was chosen by the same validation loss that is reported."
    )
    for search in searches:
        curve = search.curve
        if curve.edge is not None:
            yield (
                f"{curve.label}: the best rate, {curve.best:g}, is the {curve.edge} of its grid; its optimum may lie "
                "beyond it, so its result is not its best."
            )
        elif len(search.runs) == 1:
            yield f"{curve.label}: only one rate was tried; it was not tuned."
        elif len(curve.rates) == 1:
            yield f"{curve.label}: only one base rate was tried with its best factors; more `compare.trials` try others."
        if curve.best is None:
            yield f"{curve.label}: diverged at every rate; it is shown at the lowest."


def _of_defaults(command: str | None) -> str:
    if command:
        return (
            "Base rates were not tuned in this run: they are the defaults for this model, found by "
            f"`{command}`. With other settings than those, the ranking may be one of rates, not of optimizers."
        )
    return (
        "Base rates were not tuned in this run: they are untuned starting values, so the ranking may be one of rates, "
        "not of optimizers. `layerwise compare --lr-grid auto` tunes each optimizer on its own grid."
    )


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
