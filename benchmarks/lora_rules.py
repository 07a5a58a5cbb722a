"""Carrying a rate from LoRA rank 2 to higher ranks: `match_lora` against one rate, rsLoRA and LoRA+.

    python benchmarks/lora_rules.py         # trains a small GPT-2 (its first time), then some hundred short runs

The model and the texts are those of `python benchmarks/transfer.py --only lora`: a GPT-2 of two blocks and 64 features,
trained on the standard library's source, adapted to Python's manual. Each rule is tuned on a grid of rates at rank 2 and
tried on the same grid at the other ranks. Finished runs are not repeated; several ranks can be added later.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import peft
import torch
from torch import Tensor, nn

import layerwise as lw
from layerwise.lab.config.load import load_config
from layerwise.lab.experiments.sweep.analysis import Curve
from layerwise.lab.experiments.sweep.resampling import shift_interval
from layerwise.lab.experiments.sweep.sweep_config import SweepConfig
from layerwise.lab.models.families import build_model
from layerwise.lab.models.family import Examples
from script import RESULTS, documented_parser
from transfer import CONFIGS, prepare_adapters

BASE_RANK, ALPHA, STEPS, LENGTH = 2, 8, 100, 64
RULES = {
    "one rate": "alpha / rank, one rate for A and B",
    "match_lora": f"one rate at rank {BASE_RANK}, carried by `match_lora`",
    "rsLoRA": "alpha / sqrt(rank) (arXiv 2312.03732)",
    "LoRA+": "alpha / rank, B at 16 times A's rate (arXiv 2402.12354)",
}
#: Exponents of 2 of the rates tried at the base's rank, and at others; LoRA+'s rate is A's, which B exceeds 16 times.
GRIDS = {
    "one rate": (range(-12, -7), range(-11, -5)),
    "match_lora": (range(-12, -7), range(-12, -7)),
    "rsLoRA": (range(-12, -7), range(-12, -7)),
    "LoRA+": (range(-14, -9), range(-13, -8)),
}
RATIO = 16.0


@dataclass(frozen=True)
class Trial:
    """One run."""

    rule: str
    rank: int
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.rule}, {self.rank}, {self.lr:.6g}, {self.seed}"


@dataclass(frozen=True)
class Task:
    """The trained model's config and the text that adapters are trained on."""

    config: SweepConfig
    training: Tensor
    validation: Tensor

    def model(self, rule: str, rank: int, seed: int) -> nn.Module:
        """A fresh copy with adapters drawn from a seed."""
        plain = build_model(
            self.config.model.model_copy(update={"lora": None}), Examples(VOCABULARY, LENGTH), 0
        )
        torch.manual_seed(seed)
        settings = peft.LoraConfig(
            r=rank, lora_alpha=ALPHA, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True,
            init_lora_weights="gaussian", use_rslora=rule == "rsLoRA",
        )  # fmt: skip
        return peft.get_peft_model(plain, settings)

    def batches(self, text: Tensor, count: int, seed: int) -> list[dict[str, Tensor]]:
        """`count` batches of 8 pieces of the text."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - LENGTH, (count, 8, 1), generator=generator)
        pieces = text[starts + torch.arange(LENGTH)]
        return [{"input_ids": piece, "labels": piece} for piece in pieces]


VOCABULARY = 257


def prepare() -> Task:
    """Trains the model that the adapters are put on, where there is none, and reads the manual."""
    config = load_config(CONFIGS / "lora.yaml", ["run.dir=runs/transfer", "run.name=lora-rules"], SweepConfig)
    prepare_adapters(config)
    text = torch.tensor(list(Path(config.data.paths[0]).read_bytes()))
    cut = int(0.9 * len(text))
    return Task(config, text[:cut], text[cut:])


def run(task: Task, trial: Trial) -> float:
    """The validation loss after a trial's steps."""
    model = task.model(trial.rule, trial.rank, trial.seed)
    ratio = RATIO if trial.rule == "LoRA+" else 1.0
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if f"lora_{kind}" in name], "lr": trial.lr * factor}
        for kind, factor in (("A", 1.0), ("B", ratio))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    if trial.rule == "match_lora" and trial.rank != BASE_RANK:
        lw.match_lora(model, optimizer, task.batches(task.training, 9, 1000 + trial.seed), BASE_RANK)
    for batch in task.batches(task.training, STEPS, trial.seed):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in task.batches(task.validation, 24, 0)]
    return fmean(losses)


def grid(rule: str, rank: int) -> list[float]:
    """The rates of a rule at a rank."""
    return [2.0**k for k in GRIDS[rule][rank != BASE_RANK]]


def trials(ranks: list[int], seeds: list[int]) -> Iterator[Trial]:
    """The runs of a table; at the base's rank `match_lora` and one rate for all are the same."""
    for seed, rule, rank in itertools.product(seeds, RULES, [BASE_RANK, *ranks]):
        if rule != "match_lora" or rank != BASE_RANK:
            yield from (Trial(rule, rank, lr, seed) for lr in grid(rule, rank))


def table(found: dict[str, float], ranks: list[int], seeds: list[int]) -> str:
    """Shift from the base's rank in steps of the grid, and losses at the own best, the carried rate and half of it.

    Of the seeds of which all runs of a rule have finished.
    """

    def known(rule: str, rank: int, lr: float, seed: int) -> float | None:
        same = "one rate" if rule == "match_lora" and rank == BASE_RANK else rule
        return found.get(Trial(same, rank, lr, seed).key)

    def complete(rule: str) -> list[int]:
        return [
            seed for seed in seeds
            if all(known(rule, rank, lr, seed) is not None for rank in (BASE_RANK, *ranks) for lr in grid(rule, rank))
        ]  # fmt: skip

    def curve(rule: str, rank: int) -> Curve:
        losses = {
            lr: [value for seed in complete(rule) if (value := known(rule, rank, lr, seed)) is not None]
            for lr in grid(rule, rank)
        }
        return Curve("standard", rank, losses, 6.0)

    lines = [
        "| rule | rank | seeds | best rate | shift, steps of 2 | 95 % | loss at own best | at base's best | at half of it |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rule, rank in itertools.product(RULES, [BASE_RANK, *ranks]):
        if not complete(rule):
            continue
        base, here = curve(rule, BASE_RANK), curve(rule, rank)
        assert base.best is not None
        assert here.best is not None
        shift = torch.tensor(here.best / base.best).log2().item()
        interval = None if rank == BASE_RANK else shift_interval(base, here, 2.0)
        ends = "" if interval is None else "{:+.0f}..{:+.0f}".format(*interval).replace("+0", "0")
        carried, half = (
            f"{here.mean(lr):.3f}" if lr in here.losses else "" for lr in (base.best, base.best / 2)
        )
        edge = "!" if here.at_edge or base.at_edge else ""
        own = f"{here.mean(here.best):.3f} ± {here.spread(here.best):.3f}"
        shown = (
            rule,
            rank,
            len(complete(rule)),
            f"{here.best:.2g}{edge}",
            f"{shift:+.0f}".replace("+0", "0"),
            ends,
            own,
            carried,
            half,
        )
        lines.append(f"| {' | '.join(map(str, shown))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--results", type=Path, default=RESULTS / "lora_rules.jsonl")
    parser.add_argument("--table", action="store_true", help="run nothing: the table of what has finished")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if options.results.exists():
        rows = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    found = {row["trial"]: row["loss"] for row in rows}
    missing = [trial for trial in trials(options.ranks, options.seeds) if trial.key not in found]
    task = prepare() if missing and not options.table else None
    for trial in missing if task else ():
        assert task is not None
        found[trial.key] = run(task, trial)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"trial": trial.key, "loss": round(found[trial.key], 5)}) + "\n")
        print(trial.key, f"{found[trial.key]:.4f}", flush=True)
    text = table(found, options.ranks, options.seeds)
    options.results.with_suffix(".md").write_text(
        "Made by `python benchmarks/lora_rules.py`; docs/transfer.md explains it.\n\n" + text,
        encoding="utf-8",
    )
    print(text)


if __name__ == "__main__":
    main()
