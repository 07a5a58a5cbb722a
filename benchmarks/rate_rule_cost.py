"""What rate rules add to a step of D-Muon, in processor time, all taking turns.

    python benchmarks/rate_rule_cost.py            # four minutes on one core

Processor time instead of the clock's, in one thread: neighbours on the machine then matter little. A turn is four steps, as
`DualNormAdaptive` measures at one of them. The ratio is the median over rounds of the ratio within a round. Writes
`benchmarks/results/rate_rule_cost_KIND.md`, a file for each kind of processor, as `optimizer_step.py` has.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

import layerwise as lw
import machine
from layerwise.geometry.layout import Layout, MatrixLayout, TransposedLayout
from optimizer_step import SETS, kind_of, layerwise_groups
from script import RESULTS, documented_parser, write_page

#: three blocks of a GPT-2 at d = 384, with q, k and v in one, the other way round and apart; and the tiny models' block
CASES = {
    "three blocks, d = 384": (MatrixLayout(), SETS["d384"][:12]),
    "three blocks, d = 384, stored as (in, out)": (TransposedLayout(), [(d_in, d_out) for d_out, d_in in SETS["d384"][:12]]),
    "three blocks, d = 384, q, k, v apart": (MatrixLayout(), SETS["d384-split"][:18]),
    "four blocks, d = 128": (MatrixLayout(), [(384, 128), (128, 128), (512, 128), (128, 512)] * 4),
}


#: Steps of a turn: of the rules' `every` the largest.
TURN = 4
RULES = (lw.DualNormAdaptive(), lw.NormAdaptive())


def ratios(layout: Layout, shapes: list[tuple[int, int]], rounds: int) -> tuple[float, list[tuple[float, float]]]:
    """Seconds of a step of D-Muon, and the median and spread (quartiles' distance) of the ratio with each rule."""
    generator = torch.Generator().manual_seed(0)
    steps = []
    for rule in (None, *RULES):
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        groups = [group | {"layout": layout} for group in layerwise_groups(params)]
        steps.append(lw.DMuon(groups, lr=1e-3, rates=rule).step)
    times: list[list[float]] = []
    for number in range(-2, rounds):
        taken = [0.0] * len(steps)
        for which in range(len(steps))[:: 1 if number % 2 else -1]:
            started = time.process_time()
            for _ in range(TURN):
                steps[which]()
            taken[which] = (time.process_time() - started) / TURN
        if number >= 0:
            times.append(taken)
    found = []
    for which in range(1, len(steps)):
        low, middle, high = statistics.quantiles([taken[which] / taken[0] for taken in times], n=4)
        found.append((middle, high - low))
    return statistics.median(taken[0] for taken in times), found


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# What a rate rule costs",
        "",
        "`python benchmarks/rate_rule_cost.py`: processor time of a step of `DMuon`, and with a rule over it (in brackets",
        "the distance of its quartiles).",
        "",
        f"| matrices | D-Muon, seconds | {' | '.join(f'`{type(rule).__name__}`' for rule in RULES)} |",
        "|---|---|---|---|",
    ]
    for name, case in CASES.items():
        seconds, found = ratios(*case, given.rounds)
        ruled = " | ".join(f"{middle:.3f} ({spread:.3f})" for middle, spread in found)
        lines.append(f"| {name} | {seconds:.4f} | {ruled} |")
        print(lines[-1], flush=True)
    write_page(given.out / f"rate_rule_cost_{kind_of('cpu')}.md", [*lines, "", machine.line()])


if __name__ == "__main__":
    main()
