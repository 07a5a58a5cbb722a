"""The runs of `when_to_match.py`: a small and a large model, ways of matching, and what has been run so far."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import layerwise as lw
from layerwise.lab.config.schema import Config
from layerwise.lab.data.batches import TextData
from layerwise.lab.experiments.sweep.sweep_report import Curve
from layerwise.lab.models.families import build_model, resized
from layerwise.lab.models.family import Examples

SMALL, LARGE, STEPS, WARM_UP, LENGTH = 16, 128, 200, 20, 32
#: Exponents of 2 of the rates: of one rate at either width, and around the small model's best for what is carried.
GRIDS = {SMALL: range(-9, -2), LARGE: range(-11, -4)}
BASE_SEEDS = (0, 1, 2, 3)
#: The same GPT-2, whose small model starts with weights that multiply as the large one's do: deviation 0.02 sqrt(8).
SCALED = "gpt2-scaled"
MODELS = {
    SCALED: {"preset": "gpt2-tiny", "n_layer": 2, "n_embd": SMALL, "n_head": 1},
    "gpt2": {"preset": "gpt2-tiny", "n_layer": 2, "n_embd": SMALL, "n_head": 1},
    "PreNorm": {"preset": "decoder", "base_width": SMALL, "base_heads": 1, "norm": "pre"},
    "PreNormPostMod": {"preset": "decoder", "base_width": SMALL, "base_heads": 1, "norm": "pre_post_mod"},
}


@dataclass(frozen=True)
class Way:
    """A way of matching.

    Attributes:
        at: the first matched step, counted from 0.
        every: steps between matchings; None: once.
        last: the last step that is matched.
        mean: keep the geometric mean of the multipliers found so far, and not the last ones.
        batches: whose mean gradient the first step takes.
    """

    at: int = 0
    every: int | None = None
    last: int = 0
    mean: bool = False
    batches: int = 1

    @property
    def steps(self) -> range:
        """The matched steps."""
        return range(self.at, max(self.at, self.last) + 1, self.every or 1)


LAST = "steps 1, 6, ..., 21: the last"
WAYS = {
    "first step": Way(),
    "first step, of 8 batches": Way(batches=8),
    "step 10": Way(at=9, last=9),
    "step 20, the end of the warm-up": Way(at=19, last=19),
    LAST: Way(every=5, last=20),
    "steps 1, 6, ..., 21: their mean": Way(every=5, last=20, mean=True),
}
#: Of which ways each model is trained; what the others do to the rates is told.
TRAINED = {
    model: ["first step"] if model == SCALED else [way for way in WAYS if way not in ("first step, of 8 batches", LAST)]
    for model in ("gpt2", SCALED, "PreNorm", "PreNormPostMod")
}
ONE_RATE = "one rate"


def carried(model: str, best: int) -> range:
    """The exponents that matched rates are tried at; GPT-2's best ones move upwards."""
    low, high = (-1, 3) if MODELS[model]["preset"] == "gpt2-tiny" else (-2, 2)
    return range(best + low, best + high + 1)


@dataclass(frozen=True)
class Trial:
    """One run."""

    model: str
    way: str
    width: int
    exponent: int
    seed: int

    @property
    def key(self) -> str:
        same = (self.model, self.way, self.width) == (SCALED, ONE_RATE, LARGE)  # as without scaling: run once
        return f"{'gpt2' if same else self.model}, {self.way}, width {self.width}, 2^{self.exponent}, seed {self.seed}"


class Matching:
    """FLeRM at the steps of a `Way`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, way: Way, base: lw.BaseRates, seed: int):
        self.way = way
        self.flerm = lw.FLeRM(model, optimizer, base, at=way.at, every=way.every, seed=seed)
        self._logs: dict[str, list[float]] = {}

    def around(self, step: int, inputs: list[Tensor]) -> AbstractContextManager[None]:
        return self.flerm.step(inputs) if step <= self.way.steps[-1] else nullcontext()

    def after(self, step: int) -> None:
        """Puts the mean of the multipliers so far in the place of the last ones."""
        if not self.way.mean or step not in self.way.steps:
            return
        state = self.flerm.state_dict()
        for name, multiplier in state["multipliers"].items():
            self._logs.setdefault(name, []).append(math.log(multiplier))
        means = {name: math.exp(fmean(logs)) for name, logs in self._logs.items()}
        self.flerm.load_state_dict({**state, "multipliers": means})


def schedule(step: int) -> float:
    """Warm-up, and a cosine to a tenth: the part of the base rate in a step, counted from 0."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    part = (step - WARM_UP) / (STEPS - WARM_UP)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * part))


@cache
def config_of(name: str, width: int) -> Config:
    """The lab's config of a model at a width, for its builder and its data."""
    plain = Config.model_validate(
        {
            "model": MODELS[name],
            "data": {"tokenizer": "byte", "seq_len": LENGTH},
            "training": {"steps": STEPS, "batch_size": 8, "eval_batches": 16},
        }
    )
    if name == SCALED and width == SMALL:
        plain = plain.replace({"model.initializer_range": 0.02 * math.sqrt(LARGE / SMALL)})
    return plain.replace(resized(plain.model, "width", width))


def start(name: str, width: int, exponent: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, TextData]:
    """A fresh model, its optimizer, and the batches of a seed."""
    config = config_of(name, width).replace({"training.seed": seed})
    data = TextData(config)
    model = build_model(config.model, Examples(data.vocab_size, LENGTH), seed)
    return model, torch.optim.AdamW(model.parameters(), lr=2.0**exponent, weight_decay=0.0), data


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    found = model(inputs)
    logits = getattr(found, "logits", found)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def take_gradient(model: nn.Module, data: TextData, step: int, batches: int) -> None:
    """The gradient of a step: of its batch, or at the first step of several, which no other step sees."""
    steps = [step, *(10 * STEPS + k for k in range(1, batches))] if step == 0 else [step]
    for number in steps:
        batch = data.batch(number)
        (loss_of(model, batch.inputs, batch.targets) / len(steps)).backward()


def measured_on(data: TextData) -> list[Tensor]:
    """Inputs that no step sees."""
    return [data.batch(STEPS + k).inputs for k in range(4)]


def record(name: str, way: Way, exponent: int) -> lw.BaseRates:
    """The small model's rates at the steps of a way, at its best rate."""

    def run(seed: int) -> lw.FunctionSpaceRecorder:
        model, optimizer, data = start(name, SMALL, exponent, seed)
        steps = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        recorder = lw.FunctionSpaceRecorder(model, optimizer, way.every or max(1, way.at), seed=seed)
        for step in range(way.steps[-1] + 1):
            optimizer.zero_grad()
            take_gradient(model, data, step, way.batches)
            with recorder.step(measured_on(data)):
                optimizer.step()
            steps.step()
        return recorder

    return lw.record_base(run, BASE_SEEDS)


def run(trial: Trial, base: lw.BaseRates | None) -> float:
    """The validation loss after a trial's steps."""
    model, optimizer, data = start(trial.model, trial.width, trial.exponent, trial.seed)
    steps = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    way = WAYS.get(trial.way, Way())
    matching = None if base is None else Matching(model, optimizer, way, base, trial.seed)
    for step in range(STEPS):
        optimizer.zero_grad()
        take_gradient(model, data, step, way.batches)
        with nullcontext() if matching is None else matching.around(step, measured_on(data)):
            optimizer.step()
        if matching is not None:
            matching.after(step)
        steps.step()
    model.eval()
    with torch.no_grad():
        losses = [loss_of(model, batch.inputs, batch.targets).item() for batch in data.validation(16)]
    return fmean(losses)


def multipliers(name: str, way: Way, exponent: int, seed: int = 0) -> dict[str, float]:
    """What the large model's rates are multiplied by after the last match, by kind: the geometric mean, and the extremes."""
    base = record(name, way, exponent)
    model, optimizer, data = start(name, LARGE, exponent, seed)
    steps = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    matching = Matching(model, optimizer, way, base, seed)
    for step in range(way.steps[-1] + 1):
        optimizer.zero_grad()
        take_gradient(model, data, step, way.batches)
        with matching.around(step, measured_on(data)):
            optimizer.step()
        matching.after(step)
        steps.step()
    found = matching.flerm.state_dict()["multipliers"]
    names = {id(p): n for n, p in model.named_parameters()}
    inside = [found[n] for n in names.values() if (".h." in n or "blocks." in n) and model.get_parameter(n).ndim == 2]
    return {
        "matrices in blocks": math.exp(fmean(map(math.log, inside))),
        "least": min(inside),
        "most": max(inside),
        "embedding": found[names[id(model.get_input_embeddings().weight)]],
    }


class Runs:
    """What has been run, in a file of JSON lines, and what more is run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        self.found: dict[str, float] = {row["trial"]: row["loss"] for row in rows if "trial" in row}
        self.multipliers: dict[str, dict[str, float]] = {row["way"]: row["rates"] for row in rows if "way" in row}
        self._bases: dict[tuple[str, str, int], lw.BaseRates] = {}

    def run(self, trial: Trial, best: int) -> None:
        """Runs a trial that has no result; `best`: the small model's best exponent."""
        if trial.key in self.found:
            return
        base = None
        if trial.way != ONE_RATE:
            key = (trial.model, trial.way, best)
            if key not in self._bases:
                self._bases[key] = record(trial.model, WAYS[trial.way], best)
            base = self._bases[key]
        loss = run(trial, base)
        self.found[trial.key] = loss if math.isfinite(loss) else math.inf
        self._write({"trial": trial.key, "loss": round(self.found[trial.key], 5)})

    def match(self, model: str, way: str, best: int) -> None:
        """What a way makes of the rates, where that is not known."""
        key = f"{model}, {way}"
        if key not in self.multipliers:
            self.multipliers[key] = multipliers(model, WAYS[way], best)
            self._write({"way": key, "rates": {k: float(f"{v:.3g}") for k, v in self.multipliers[key].items()}})

    def _write(self, row: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def curve(self, model: str, way: str, width: int, exponents: range, seeds: list[int]) -> Curve:
        """Losses by rate, of the seeds given."""
        losses = {2.0**k: [self.found[Trial(model, way, width, k, seed).key] for seed in seeds] for k in exponents}
        return Curve("standard", width, losses, math.log(257))


def trials(model: str, best: int, seeds: list[int]) -> Iterator[Trial]:
    """The large model's runs, a seed after the other."""
    for seed in seeds:
        yield from (Trial(model, ONE_RATE, LARGE, k, seed) for k in GRIDS[LARGE])
        for way, exponent in itertools.product(TRAINED[model], carried(model, best)):
            yield Trial(model, way, LARGE, exponent, seed)


def best_of(runs: Runs, model: str, seeds: list[int]) -> int:
    """The exponent of the small model's best rate."""
    best = runs.curve(model, ONE_RATE, SMALL, GRIDS[SMALL], seeds).best
    assert best is not None
    return round(math.log2(best))
