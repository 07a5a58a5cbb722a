"""What the rate rule is worth: loss by optimizer, base rate and seed, on small models.

    python benchmarks/rate_rule.py plan                # of each study: trials, how many are done, seconds that are left
    python benchmarks/rate_rule.py run decisive        # what is missing of a study; again after an interruption
    python benchmarks/rate_rule.py table               # benchmarks/results/rate_rule.md from all runs there are
    python benchmarks/rate_rule.py run rivals --steps 5 --out tried       # whether all trials of a study can be run

Studies are lists of trials in `rate_rule_plan.py`, which also says why each is asked for. A trial is a model, a contender,
a base rate, factors of roles, a seed and a length; its result is a line of `benchmarks/results/rate_rule.jsonl`. Finished
trials are not repeated. Several processes can work at one study: each takes what no other has taken.

All trials train in one thread, in float32 on every processor, with the lab's data, models and schedule (cosine after 20
steps of warm-up, clipping at 1), on the same batches for the same seed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rate_rule_rivals
from layerwise.lab.config.schema import Config
from layerwise.lab.data.batches import ImageData, TextData
from layerwise.lab.models.families import build_model, loss
from layerwise.lab.models.family import Examples
from layerwise.lab.optimizers.registry import build_optimizer
from rate_rule_models import BUILD, prepare
from rate_rule_plan import CONTENDERS, FROZEN, MODELS, STUDIES, Trial
from rate_rule_table import page, plan
from script import RESULTS, documented_parser, iterate_in_float32

#: whose multipliers `FROZEN` contenders take
SOURCES = {source for source, _ in FROZEN.values()}


def configuration(trial: Trial, means: Mapping[str, float] | None = None) -> Config:
    """The lab's config of a trial.

    Args:
        trial: what is run.
        means: for a contender of `FROZEN`, the mean multipliers that it is made of.
    """
    sections = MODELS[trial.model]
    source, made = FROZEN.get(trial.contender, (trial.contender, None))
    optimizer = {**CONTENDERS[source], "lr": trial.lr}
    if made is not None:
        optimizer["rates"] = {"rule": "static", "multipliers": made(means or {})}
    if trial.roles:
        optimizer["role_factors"] = dict(trial.roles)
    training = {**sections.get("training", {}), "steps": trial.steps, "seed": trial.seed}
    return Config.model_validate({**sections, "training": training, "optimizer": optimizer})


def train(trial: Trial, means: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Trains a trial on the processor, and returns what `fit` does."""
    prepare(trial.model)
    return fit(configuration(trial, means), BUILD.get(trial.model), recorded=trial.contender in SOURCES)


def fit(
    config: Config,
    build: Callable[[Examples], nn.Module] | None = None,
    device: str = "cpu",
    recorded: bool = False,
) -> dict[str, Any]:
    """Validation loss in nats at the end and on the way, and the seconds of training.

    Args:
        config: the lab's config of a run.
        build: makes the model in the place of the lab.
        device: where it is trained. Seconds are processor time on a CPU and wall time on a GPU.
        recorded: whether the time means of the multipliers come along.
    """
    training = config.training
    clock = time.process_time if device == "cpu" else time.perf_counter
    data = (ImageData if config.data.holds_images else TextData)(config)
    examples = Examples(data.vocab_size, config.data.seq_len, data.features)
    torch.manual_seed(training.seed)
    model = build_model(config.model, examples, training.seed) if build is None else build(examples)
    model = model.to(device)
    half = training.precision == "bf16"
    optimizer = build_optimizer(model, config.optimizer)
    base = [group["lr"] for group in optimizer.param_groups]
    curve: dict[str, float] = {}
    multipliers: list[dict[str, float]] = []
    seconds = 0.0
    for step in range(config.training.steps):
        started = clock()
        batch = data.batch(step).to(torch.device(device))
        with torch.autocast(device, torch.bfloat16, enabled=half):
            value = loss(model, batch.inputs, batch.targets)
        if not math.isfinite(value.item()):
            return {"loss": None, "diverged": step}
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm or math.inf)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * config.schedule.factor(step, config.training.steps)
        optimizer.step(lambda value=value: value)  # for those that look at the loss
        optimizer.zero_grad()
        seconds += clock() - started
        if recorded and step % 10 == 0:
            multipliers.append({unit: rate.multiplier for unit, rate in optimizer.layer_rates().items()})
        if (step + 1) % 100 == 0 and step + 1 < config.training.steps:
            curve[str(step + 1)] = round(evaluate(model, data, training.batch_size)[0], 4)
    final, wrong = evaluate(model, data, training.batch_size)
    extra: dict[str, Any] = {"errors": round(wrong, 4)} if config.data.holds_images else {}
    if multipliers:
        extra["multipliers"] = mean_multipliers(multipliers)
    return {"loss": round(final, 5), **extra, "curve": curve, "seconds": round(seconds, 1)}


def mean_multipliers(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of the units that a rule set at all."""
    means = {unit: round(sum(row[unit] for row in rows) / len(rows), 4) for unit in rows[0]}
    return {unit: mean for unit, mean in means.items() if any(row[unit] != 1.0 for row in rows)}


def result_of(trial: Trial, store: Store) -> dict[str, Any]:
    """Trains a trial, and before one of `FROZEN` the run whose multipliers it takes, where no result has them."""
    if trial.contender not in FROZEN:
        return train(trial)
    source = replace(trial, contender=FROZEN[trial.contender][0])
    known = (row["multipliers"] for row in store.results() if row["trial"] == as_row(source) and "multipliers" in row)
    means = next(known, None) or train(source).get("multipliers")
    return {"loss": None, "diverged": 0} if means is None else train(trial, means)


@torch.no_grad()
def evaluate(model: nn.Module, data: TextData | ImageData, at_once: int) -> tuple[float, float]:
    """Mean loss over the validation examples, and of images the fraction that is classed wrongly."""
    model.eval()
    device = next(model.parameters()).device
    total, wrong, count = 0.0, 0, 0
    for batch in (found.to(device) for found in data.validation(at_once)):
        total += loss(model, batch.inputs, batch.targets).item() * len(batch.inputs)
        count += len(batch.inputs)
        if isinstance(data, ImageData):
            wrong += int((model(batch.inputs).argmax(-1) != batch.targets).sum())
    model.train()
    return total / count, wrong / count


def as_row(trial: Trial) -> dict[str, Any]:
    """As it comes back from the file."""
    row: dict[str, Any] = json.loads(json.dumps(asdict(trial)))
    return row


class Store:
    """Results in a file of JSON lines; trials that a living process has taken stand in a second file beside it."""

    def __init__(self, path: Path) -> None:
        self.path, self.taken = path, path.with_suffix(".taken")

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def take(self, trials: list[Trial]) -> Trial | None:
        """The first trial that is neither done nor taken, taken."""
        with self._locked():
            done = [row["trial"] for row in self.results()]
            lines = self.taken.read_text().splitlines() if self.taken.exists() else []
            rows = [json.loads(line) for line in lines]
            done += [row["trial"] for row in rows if Path(f"/proc/{row['process']}").exists()]
            free = next((trial for trial in trials if as_row(trial) not in done), None)
            if free is not None:
                self._append(self.taken, {"trial": as_row(free), "process": os.getpid()})
            return free

    def add(self, trial: Trial, result: dict[str, Any]) -> None:
        with self._locked():
            self._append(self.path, {"trial": as_row(trial), **result})

    @staticmethod
    def _append(path: Path, row: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self.path.with_suffix(".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("command", choices=("run", "table", "plan"))
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; all by default")
    parser.add_argument("--steps", type=int, help="of every trial, in place of its own: to see whether it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args()
    rate_rule_rivals.register()
    given.out.mkdir(parents=True, exist_ok=True)
    store = Store(given.out / "rate_rule.jsonl")
    if given.command == "plan":
        print(plan(given.studies or list(STUDIES), store.results()))
        return
    if given.command == "run":
        torch.set_num_threads(1)
        iterate_in_float32()
        trials = [trial for study in given.studies or STUDIES for trial in STUDIES[study].trials]
        if given.steps is not None:
            trials = [replace(trial, steps=given.steps) for trial in trials]
        while (trial := store.take(trials)) is not None:
            result = result_of(trial, store)
            store.add(trial, result)
            print(trial, result["loss"], flush=True)
    (given.out / "rate_rule.md").write_text(page(store.results()), encoding="utf-8")


if __name__ == "__main__":
    main()
