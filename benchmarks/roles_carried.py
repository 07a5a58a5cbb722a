"""Tuned small, carried large: do rates tuned role by role on a small model help a larger one, and who carries them best?

    python benchmarks/roles_carried.py run                          # width x 4, x 8, depth x 4; goes on after a stop
    python benchmarks/roles_carried.py run --axes width --seeds 0   # less of it
    python benchmarks/roles_carried.py plan                         # how many runs there are at most, and their seconds
    python benchmarks/roles_carried.py table                        # benchmarks/results/roles_carried.md from what there is

A Llama of 2 blocks and 64 features under D-Muon is tuned with one rate, and role by role: coordinate by coordinate, a factor
of 2 or 4 on the rates of embedding, head and vectors, then the base rate again. At the larger size every method of `METHODS`
is run at the small model's best base rate, half and twice of it, and again with `DualNormAdaptive` on top (then tuned so
on the small model too). The same search at the larger size says what there is to be gained. The axis `started` is that of
width with the small model's weights started twice as large, as matching wants it (docs/transfer.md); `wider` is width x 8,
with all methods carried from a small model that starts so. A result is a line of `benchmarks/results/roles_carried.jsonl`;
finished runs are not repeated.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

import layerwise as lw
import machine
from layerwise.lab.config.schema import Config, ModelConfig
from layerwise.lab.models.families import resized
from layerwise.lab.optimizers.registry import mean_multipliers
from layerwise.lab.training.observers import quiet_matching
from layerwise.lab.training.run import record, train
from rate_rule import Store, as_row
from rate_rule_plan import AT_EVERY_STEP
from roles_carried_table import page
from script import RESULTS, documented_parser, iterate_in_float32

Factors = tuple[tuple[str, float], ...]

MODEL: Final = {
    "preset": "llama-tiny",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
#: By axis: the small model's size, and the large one's; and seconds of a step of a large one on one core.
AXES: Final = {"width": (64, 256), "started": (64, 256), "depth": (2, 8), "wider": (32, 256)}
#: What the model is changed along, where that is not the axis; and there the deviation of the small model's weights: that
#: of the large one's, 0.02, times the root of the ratio of their widths.
CHANGED: Final = {"started": "width", "wider": "width"}
STARTED: Final = {"started": 0.02 * 4**0.5, "wider": 0.02 * 8**0.5}
SECONDS_A_STEP: Final = {
    ("width", 32): 0.05,
    ("width", 64): 0.07,
    ("width", 256): 0.35,
    ("depth", 2): 0.07,
    ("depth", 8): 0.14,
}
STEPS: Final = 150
RATES: Final = (0.004, 0.008, 0.016, 0.032)
#: Of an axis whose small model wants other ones: the narrower it is, the larger.
OTHER_RATES: Final = {"wider": (0.008, 0.016, 0.032, 0.064)}
ROLES: Final = ("embedding", "head", "vector")
ROLE_FACTORS: Final = (2.0, 4.0)
AROUND: Final = (0.5, 1.0, 2.0)
#: What a rule on top is; none first.
RULES: Final = (None, "dual_norm_adaptive")

METHODS: Final[Mapping[str, str]] = {
    "one rate": "the small model's best single rate",
    "copied factors": "its base rate and its factors of roles, as they are",
    "copied, times 1/width": "the same, matrices and head times 1/width (muP's rule for Adam, as in `layerwise sweep`)",
    "function space, one rate": "FLeRM from a base of one rate: what matching does without factors",
    "function space, factors": "FLeRM from a base recorded with the factors",
    "function space, multipliers too": "and with the time means of the rule's multipliers on the small model in the base",
}


@dataclass(frozen=True)
class Trial:
    """One run."""

    axis: str
    size: int
    method: str
    rule: str | None
    lr: float
    roles: Factors
    seed: int
    steps: int = STEPS

    @property
    def width_factor(self) -> float:
        """The small model's width over this one's."""
        return AXES[self.axis][0] / self.size if CHANGED.get(self.axis, self.axis) == "width" else 1.0

    @property
    def factors(self) -> dict[str, float]:
        """What the rate of each role is multiplied by."""
        found = dict(self.roles)
        if self.method == "copied, times 1/width":
            for role in ("hidden", "head"):
                found[role] = found.get(role, 1.0) * self.width_factor
        return found


@dataclass(frozen=True)
class Point:
    """A base rate with factors of roles."""

    lr: float
    roles: Factors = ()


@dataclass(frozen=True)
class Tuned:
    """What a search found."""

    one_rate: Point
    by_role: Point


class Study:
    """All runs, each made once.

    Args:
        store: the results.
        bases: a folder for base files.
        seeds: of every point.
        steps: of every run.
        changes: dotted keys of every config.
    """

    def __init__(
        self,
        store: Store,
        bases: Path,
        seeds: Sequence[int],
        steps: int,
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        self.store, self.bases, self.seeds, self.steps = store, bases, seeds, steps
        self.changes = changes or {}

    def run(self, axes: Iterable[str]) -> None:
        for axis in axes:
            small, large = AXES[axis]
            self.search(CHANGED.get(axis, axis), large, None)
            for rule in RULES:
                tuned = self.search(axis, small, rule)
                for method in methods(axis, rule):
                    point = tuned.one_rate if "one rate" in method else tuned.by_role
                    for around in AROUND:
                        self.mean(axis, large, method, rule, replace(point, lr=point.lr * around))

    def search(self, axis: str, size: int, rule: str | None) -> Tuned:
        """One rate, then a factor for each role at the best so far, then lower base rates with them."""

        def loss(point: Point) -> float:
            return self.mean(axis, size, "tuned", rule, point)

        one = best = min((Point(lr) for lr in OTHER_RATES.get(axis, RATES)), key=loss)
        for role in ROLES:
            tried = [replace(best, roles=(*best.roles, (role, factor))) for factor in ROLE_FACTORS]
            best = min([best, *tried], key=loss)
        best = min([best, *(replace(best, lr=best.lr * part) for part in (0.5**0.5, 0.5))], key=loss)
        return Tuned(one, best)

    def mean(self, axis: str, size: int, method: str, rule: str | None, point: Point) -> float:
        """The mean loss over the seeds; infinite where one diverged."""
        trials = [Trial(axis, size, method, rule, point.lr, point.roles, seed, self.steps) for seed in self.seeds]
        losses = [self.loss(trial) for trial in trials]
        return statistics.fmean(float("inf") if loss is None else loss for loss in losses)

    def loss(self, trial: Trial) -> float | None:
        known = [row["loss"] for row in self.store.results() if row["trial"] == as_row(trial)]
        if known:
            return known[0]
        with tempfile.TemporaryDirectory() as folder:
            run = train(self.config(trial, Path(folder)))
            loss = run.final_val_loss if run.status == "finished" else None
        self.store.add(trial, {"loss": loss})
        print(trial, loss, flush=True)
        return loss

    def config(self, trial: Trial, folder: Path) -> Config:
        base = {} if "function space" not in trial.method else {"function_space.match": str(self.base(trial))}
        return self.plain(trial).replace({**base, "run.dir": str(folder), "run.name": "run"})

    def plain(self, trial: Trial) -> Config:
        """The run of a trial without matching."""
        optimizer: dict[str, Any] = {"name": "d-muon", "lr": trial.lr, "role_factors": trial.factors}
        if trial.rule is not None:
            optimizer["rates"] = {**AT_EVERY_STEP, "rule": trial.rule}  # as it was when they were run
        model = ModelConfig.model_validate(MODEL)
        config = Config.model_validate({
            "model": MODEL,
            "optimizer": optimizer,
            "training": {"batch_size": 8, "steps": trial.steps, "seed": trial.seed, "eval_every": trial.steps,
                "eval_batches": 16, "checkpoint_every": 0, "record_every": 10},
            "run": {"tensorboard": False},
        })  # fmt: skip
        small = trial.size == AXES[trial.axis][0]
        started = {"model.initializer_range": STARTED[trial.axis]} if small and trial.axis in STARTED else {}
        size = resized(model, CHANGED.get(trial.axis, trial.axis), trial.size)
        return config.replace({**size, **started, **self.changes})

    def base(self, trial: Trial) -> Path:
        """The base file that a trial is matched to, recorded where there is none: of the small model at its own settings.

        Rates are taken per unit of the base rate, so a base at another rate is the same; the rule has no say at the
        first step, on which it is recorded.
        """
        small = replace(trial, size=AXES[trial.axis][0], seed=self.seeds[0])
        named = [trial.axis, "with" if trial.rule else "without", *(f"{r}{f:g}" for r, f in trial.roles)]
        path = self.bases / f"{'-'.join(named)}{'-multipliers' if 'multipliers' in trial.method else ''}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            rates = record(self.plain(small), self.seeds)
            if "multipliers" in trial.method:
                rates = multiplied(rates, self.multipliers(small))
            rates.save(path)
        return path

    def multipliers(self, small: Trial) -> dict[str, float]:
        """Time means of the rule's multipliers on the small model."""
        with tempfile.TemporaryDirectory() as folder:
            config = self.plain(replace(small, rule=RULES[1])).replace({"run.dir": folder, "run.name": "run"})
            train(config)
            return mean_multipliers(str(config.run_path))


def multiplied(base: lw.BaseRates, multipliers: Mapping[str, float]) -> lw.BaseRates:
    """The base of a model whose parameters had these multipliers: function-space rates are proportional to them."""

    def scaled(rate: Any, factor: float) -> Any:
        error = None if rate.stderr is None else rate.stderr * factor
        return replace(rate, value=rate.value * factor, stderr=error)

    records = {
        step: {name: scaled(rate, multipliers.get(name, 1.0)) for name, rate in rates.items()}
        for step, rates in base.records.items()
    }
    return replace(base, records=records)


def methods(axis: str, rule: str | None) -> list[str]:
    """Those that are run: matching alone sees how weights start."""
    if axis == "started":
        some = [method for method in METHODS if "function space" in method]
    else:
        wide = CHANGED.get(axis, axis) == "width"
        some = [method for method in METHODS if wide or "width" not in method]
    return [method for method in some if not (rule and "multipliers" in method)]


def plan(axes: Iterable[str], seeds: int) -> str:
    """Runs at most, and the seconds of processor time of their training."""
    points = len(RATES) + len(ROLES) * len(ROLE_FACTORS) + 2
    lines = []
    for axis in axes:
        small, large = AXES[axis]
        count = sum(len(methods(axis, rule)) for rule in RULES)
        at = {small: points * len(RULES) * seeds, large: (points + count * len(AROUND)) * seeds}
        seconds = sum(runs * STEPS * SECONDS_A_STEP[CHANGED.get(axis, axis), size] for size, runs in at.items())
        lines.append(f"{axis}: {at[small]} runs of {small} and {at[large]} of {large}, {seconds:,.0f} seconds")
    return "\n".join(lines)


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("command", choices=("run", "plan", "table"))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args()
    if given.command == "plan":
        print(plan(given.axes, len(given.seeds)))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    store = Store(given.out / "roles_carried.jsonl")
    if given.command == "run":
        torch.set_num_threads(1)
        iterate_in_float32()
        quiet_matching()
        with tempfile.TemporaryDirectory() as bases:
            Study(store, Path(bases), given.seeds, given.steps).run(given.axes)
    text = page(store.results(), METHODS, AXES, CHANGED)
    (given.out / "roles_carried.md").write_text(f"{text}\n{machine.line()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
