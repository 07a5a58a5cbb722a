"""FLeRM on first orders and on whole updates, in a mixture of experts: which carries a router's step, and a large step.

    python benchmarks/routers.py            # writes results/routers.md and routers.json; five minutes of one core

A model of width 128 is matched to one of width 32 at its first step. Then each tensor's update, at the rate that the
matching gave it, is applied alone on a fresh batch, and the change of the outputs compared with what the small model's did.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import layerwise as lw
import machine
from linearity import LENGTH, WORDS, batches, decoder, kind
from script import RESULTS, documented_parser, write_page

WIDTHS = (32, 128)
SEQUENCES = 64
RATES = (1e-3, 1e-2)
#: What is matched on, and FLeRM's corrections.
METHODS = {
    "exact": ("exact", 0),
    "difference, once": ("difference", 0),
    "difference, corrected": ("difference", 3),
}
KINDS = ("router", "experts", "attention", "embedding, head", "gain, bias")


def mixtral(width: int) -> nn.Module:
    """Two blocks, eight experts in each, of which a word goes to two."""
    config = MixtralConfig(**decoder(width), num_local_experts=8, num_experts_per_tok=2)
    return MixtralForCausalLM(config)


def data(seed: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """A batch for the gradient, one to match on, one to judge by."""
    found = batches(seed, SEQUENCES)
    first, second, third = (next(found) for _ in range(3))
    return first, {"input_ids": second}, {"input_ids": third}


class FirstStep:
    """One step of AdamW, whose entries are all of size `lr`, from the initialisation."""

    def __init__(self, width: int, lr: float, seed: int, words: Tensor) -> None:
        torch.manual_seed(seed)
        self.model = mixtral(width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.0)
        logits = self.model(input_ids=words).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten()).backward()
        self.before = copy.deepcopy(self.model)

    def moved(self) -> dict[str, Tensor]:
        """What the step, once taken, did."""
        return {name: p.detach() - self.before.get_parameter(name).detach() for name, p in self.model.named_parameters()}

    def whole(self, update: Mapping[str, Tensor], on: Any) -> lw.Rates:
        """The outputs' change under each update alone."""
        return lw.function_space_rates(self.before, update, on, method="difference", linear=None)


@dataclass(frozen=True)
class Matching:
    """The small model's step with its rates, and the large one's that was matched to it."""

    small: FirstStep
    rates: lw.Rates
    large: FirstStep


def match(name: str, lr: float, seed: int, words: Tensor, on: Any) -> Matching:
    """A large model's first step matched to a small one's, by FLeRM."""
    method, corrections = METHODS[name]
    small = FirstStep(WIDTHS[0], lr, seed, words)
    recorder = lw.FunctionSpaceRecorder(small.model, small.optimizer, method=method)
    with recorder.step(on):
        small.optimizer.step()
    large = FirstStep(WIDTHS[1], lr, seed, words)
    flerm = lw.FLeRM(large.model, large.optimizer, lw.BaseRates.of(recorder), corrections=corrections)
    with flerm.step(on):
        large.optimizer.step()
    return Matching(small, recorder.records[0].rates, large)


def matched(lr: float, seed: int) -> list[dict[str, Any]]:
    """For each method and tensor: what the matched step does over what the small model's does, on a fresh batch."""
    words, on, fresh = data(10 + seed)
    found = {method: match(method, lr, seed, words, on) for method in METHODS}
    last = found["difference, corrected"]
    target = last.small.whole(last.small.moved(), fresh)
    rows = []
    for method in METHODS:
        large = found[method].large
        for name, rate in large.whole(large.moved(), fresh).items():
            if rate.value > 3 * rate.stderr and target[name].value > 3 * target[name].stderr:
                off = math.log2(rate.value / target[name].value)
                known = {"lr": lr, "seed": seed, "method": method, "tensor": name}
                what = kind(name, large.model.get_parameter(name).shape)
                rows.append({**known, "kind": what, "linearity": last.rates[name].linearity, "off": off})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Of each rate and kind of tensor the median over tensors and seeds of the factor, and that of its size."""
    lines = [
        "| lr | tensors | linearity | " + " | ".join(METHODS) + " |",
        "|---|---|---|" + "---|" * len(METHODS),
    ]
    for lr in RATES:
        for what in KINDS:
            of_kind = [row for row in rows if row["lr"] == lr and row["kind"] == what]
            if not of_kind:
                continue
            cells = []
            for method in METHODS:
                off = [row["off"] for row in of_kind if row["method"] == method]
                size = 2 ** statistics.median(abs(x) for x in off)
                cells.append(f"{2 ** statistics.median(off):.2f}, off {size:.2f} ({2 ** max(map(abs, off)):.1f})")
            linear = statistics.median(row["linearity"] for row in of_kind)
            lines.append(f"| {lr:g} | {what} | {linear:.2f} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    options = documented_parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for lr in RATES:
        for seed in range(given.seeds):
            rows += matched(lr, seed)
            print(f"lr {lr:g}, seed {seed}", flush=True)
    text = [
        "# Matching a mixture of experts on first orders and on whole updates",
        "",
        f"`python benchmarks/routers.py`: a Mixtral of width {WIDTHS[1]} matched to one of {WIDTHS[0]} at the first step of "
        "AdamW. Two blocks, eight",
        f"experts, two chosen; {SEQUENCES} x {LENGTH} of {WORDS} words of a Markov chain; {given.seeds} seeds. "
        "Each tensor's matched update is applied alone",
        "on a fresh batch: its change of the outputs over that of the small model's, median over tensors and seeds; "
        "`off`: the",
        "median factor up or down, in brackets the largest. `linearity`: first order over whole update, of the small model.",
        "`corrected`: what the matched step does was measured and corrected 3 times more on the same batch.",
        "",
        *table(rows),
        "",
        machine.line(", "),
    ]
    write_page(given.output / "routers.md", text)
    given.output.joinpath("routers.json").write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
