"""When to match: at the first step, later, several times in the warm-up, or on an averaged update?

    python benchmarks/when_to_match.py            # GPT-2 and two of the paper's decoders, width 16 to 128; 230 runs

A GPT-2 as nanoGPT trains it: initial weights of deviation 0.02 at every width, gains, learned positions, tied head;
batches of 8 x 32 bytes of Python's standard library, linear warm-up, cosine to a tenth. In `gpt2-scaled` the small model's
initial weights are as large as the large one's next to their width. Decoders of arXiv 2502.17405, whose weights start with
variance 1/fan_in, take the same steps. The small model is tuned with one rate, its function-space rates are recorded at
its best rate, and each way of matching is tried on the large model over a grid around that. Runs of one seed see the same
weights and batches, whatever the way. Finished runs are not repeated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from layerwise.lab.experiments.comparison import paired
from layerwise.lab.experiments.sweep.sweep_report import shift_interval
from script import RESULTS, documented_parser, write_page
from when_to_match_runs import (
    GRIDS,
    LARGE,
    ONE_RATE,
    SCALED,
    SMALL,
    TRAINED,
    WAYS,
    Runs,
    Trial,
    best_of,
    carried,
    trials,
)


def multiplier_table(runs: Runs, model: str, ways: Iterable[str]) -> list[str]:
    """What each way makes of the rates, seed 0."""
    rows = {way: runs.multipliers[f"{model}, {way}"] for way in ways}
    titles = list(next(iter(rows.values())))
    return [
        f"What the large model's rates are multiplied by; 1/width would be {SMALL / LARGE:g}. Seed 0, after the last match:",
        "",
        f"| matched at | {' | '.join(titles)} |",
        f"|---|{'---:|' * len(titles)}",
        *(f"| {way} | {' | '.join(f'{row[t]:.3g}' for t in titles)} |" for way, row in rows.items()),
        "",
    ]


def difference(one: list[float], other: list[float]) -> str:
    """The mean difference over seeds, and half its 95 % interval where there are two seeds or more."""
    found = paired(one, other)
    if found is None:  # a run diverged
        return ""
    return f"{found.mean:+.3f}" + (f" ± {found.half:.3f}" if found.seeds > 1 else "")


def table(runs: Runs, model: str, best: int, seeds: list[int]) -> list[str]:
    """A row for each way: shift, and the loss at its own best, at the carried rate, at half, and beside the first step's."""
    small = runs.curve(model, ONE_RATE, SMALL, GRIDS[SMALL], seeds)
    reference = "gpt2" if model == SCALED else model
    start = best_of(runs, reference, seeds)
    first = runs.curve(reference, "first step", LARGE, range(start, start + 1), seeds).losses[2.0**start]
    lines = [
        f"## {model}, width {SMALL} to {LARGE}, {len(seeds)} seeds",
        "",
        f"Small model: {small.mean(2.0**best):.3f} at its best rate, 2^{best}"
        + (" (an end of the grid)." if small.at_edge else "."),
        "",
        "| matched at | shift, steps of 2 | 95 % | loss at own best | at the carried rate | at half of it"
        f" | carried, minus {reference}'s at the first step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for way in (ONE_RATE, *TRAINED[model]):
        grid = GRIDS[LARGE] if way == ONE_RATE else carried(model, best)
        curve = runs.curve(model, way, LARGE, grid, seeds)
        assert curve.best is not None
        interval = shift_interval(small, curve, 2.0)
        ends = "" if interval is None else "{:+.0f} to {:+.0f}".format(*interval).replace("+0", "0")
        there = curve.losses.get(2.0**best)
        shown = (
            way,
            f"{math.log2(curve.best) - best:+.0f}{'!' if curve.at_edge else ''}".replace("+0", "0"),
            ends,
            f"{curve.mean(curve.best):.3f}",
            f"{curve.mean(2.0**best):.3f}" if there else "",
            f"{curve.mean(2.0 ** (best - 1)):.3f}" if 2.0 ** (best - 1) in curve.losses else "",
            difference(list(there), list(first)) if there and (model, way) != (reference, "first step") else "",
        )
        lines.append(f"| {' | '.join(shown)} |")
    return [*lines, ""]


def page(runs: Runs, seeds: list[int]) -> list[str]:
    """The tables of what has been run."""
    lines = ["Made by `python benchmarks/when_to_match.py`; docs/transfer.md explains it.", ""]
    for model, ways in TRAINED.items():
        lines += table(runs, model, best_of(runs, model, seeds), seeds)
        lines += multiplier_table(runs, model, WAYS if len(ways) > 1 else ways)
    return lines


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--results", type=Path, default=RESULTS / "when_to_match.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(options.results)
    for model, ways in TRAINED.items():
        for seed, exponent in itertools.product(options.seeds, GRIDS[SMALL]):
            runs.run(Trial(model, ONE_RATE, SMALL, exponent, seed), 0)
        best = best_of(runs, model, options.seeds)
        for trial in trials(model, best, options.seeds):
            runs.run(trial, best)
        for way in WAYS if len(ways) > 1 else ways:
            runs.match(model, way, best)
    lines = page(runs, options.seeds)
    write_page(options.results.with_suffix(".md"), lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
