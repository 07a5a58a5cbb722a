"""The page that `rate_rule.py` writes: losses by contender and rate, differences with paired intervals, octaves."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from shlex import quote
from typing import Any

import machine
from layerwise.lab.experiments.comparison import TOLERANCE, paired
from layerwise.lab.report import RateCurve
from layerwise.lab.report.style import Look
from rate_rule_plan import SECONDS_A_STEP, STUDIES, TIMES, TUNING_SEEDS, Trial

Row = Mapping[str, Any]
Losses = dict[float, dict[int, float]]  # base rate -> seed -> loss


def name_of(trial: Row) -> str:
    """The contender, with its factors of roles."""
    factors = {factor for _, factor in trial["roles"]}
    named = ", ".join(role for role, _ in trial["roles"])
    shared = len(trial["roles"]) == 3 and len(factors) == 1
    if not trial["roles"]:
        return str(trial["contender"])
    times = f"{factors.pop():g}" if len(factors) == 1 else "/".join(f"{f:g}" for _, f in trial["roles"])
    groups = "AdamW groups" if shared and trial["contender"] != "AdamW" else named
    return f"{trial['contender']}, {groups} x {times}"


def losses(rows: Sequence[Row]) -> dict[tuple[str, int], dict[str, Losses]]:
    """By model (the tuning seeds apart) and length, then contender; a diverged run has an infinite loss."""
    found: dict[tuple[str, int], dict[str, Losses]] = {}
    for row in rows:
        trial = row["trial"]
        model = trial["model"] + (", tuning seeds" if trial["seed"] in TUNING_SEEDS else "")
        rates = found.setdefault((model, trial["steps"]), {}).setdefault(name_of(trial), {})
        value = math.inf if row["loss"] is None else row["loss"]
        rates.setdefault(trial["lr"], {})[trial["seed"]] = value
    return found


def best_rate(of: Losses) -> float:
    """The rate of the least mean loss among those with the most seeds."""
    most = max(len(seeds) for seeds in of.values())
    among = {lr: statistics.fmean(seeds.values()) for lr, seeds in of.items() if len(seeds) == most}
    return min(among, key=among.__getitem__)


def octaves(of: Losses) -> str:
    """How far the base rates reach whose loss is within the tolerance of the best, on the seed that has the most rates."""
    seed = max((s for seeds in of.values() for s in seeds), key=lambda s: sum(s in seeds for seeds in of.values()))
    curve = RateCurve("", Look("", ""), {lr: [seeds[seed]] for lr, seeds in of.items() if seed in seeds})
    return curve.octaves(TOLERANCE) if len(curve.rates) > 1 else "one rate"


def wrong(rows: Sequence[Row], model: str, found: Mapping[str, Losses]) -> list[str]:
    """Of images: how many are classed wrongly at each contender's best rate."""
    lines = []
    for name, of in found.items():
        errors = [
            row["errors"]
            for row in rows
            if row["trial"]["model"] == model
            and name_of(row["trial"]) == name
            and row["trial"]["lr"] == best_rate(of)
            and "errors" in row
        ]
        if errors:
            lines.append(f"{name} {100 * statistics.fmean(errors):.1f} %")
    return ["", f"Classed wrongly at the best rate: {', '.join(lines)}."] if lines else []


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> str:
    """The mean of a - b over their common seeds, with its 95 % interval where there are two seeds or more."""
    seeds = sorted(a.keys() & b.keys())
    interval = paired([a[seed] for seed in seeds], [b[seed] for seed in seeds]) if seeds else None
    if interval is None:
        return ""
    if interval.seeds < 2:
        return f"{interval.mean:+.3f} (1 seed)"
    return f"{interval.mean:+.3f} ± {interval.half:.3f} ({interval.seeds} seeds)"


def minus_others(at: Mapping[str, Mapping[int, float]]) -> list[str]:
    """`DualMuon` less every other contender that shares two seeds with it or more, each at its best rate."""
    ours = at.get("DualMuon", {})
    others = [name for name in at if name != "DualMuon" and len(at[name].keys() & ours.keys()) > 1]
    lines = ["", "`DualMuon` minus others, at their best rates, same seeds:", ""]
    return [*lines, *(f"- {name}: {difference(ours, at[name])}" for name in others)] if others else []


def section(model: str, steps: int, found: Mapping[str, Losses], rows: Sequence[Row]) -> list[str]:
    """One model's table."""
    at = {name: of[best_rate(of)] for name, of in found.items()}
    tuned = min(
        (n for n in at if n.startswith("D-Muon,")),  # with factors of roles; of those with the most seeds
        key=lambda n: (-len(at[n]), statistics.fmean(at[n].values())),
        default=None,
    )
    lines = [
        f"## {model}, {steps} steps",
        "",
        "| contender | best base rate | loss | seeds | minus D-Muon, one rate | minus D-Muon tuned by role | octaves |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(found, key=lambda n: statistics.fmean(at[n].values())):
        one = difference(at[name], at["D-Muon"]) if "D-Muon" in at and name != "D-Muon" else ""
        by_role = difference(at[name], at[tuned]) if tuned and name != tuned else ""
        lines.append(
            f"| {name} | {best_rate(found[name]):g} | {statistics.fmean(at[name].values()):.3f} | {len(at[name])} "
            f"| {one} | {by_role} | {octaves(found[name])} |"
        )
    lines += [*minus_others(at), *wrong(rows, model, found), "", "Every run:", ""]
    for name, of in found.items():
        runs = [
            f"{lr:g}: " + ", ".join(f"{value:.3f} (seed {seed})" for seed, value in sorted(seeds.items()))
            for lr, seeds in sorted(of.items())
        ]
        lines.append(f"- {name}: {'; '.join(runs)}")
    return [*lines, ""]


def seconds_of(trial: Trial, rows: Sequence[Row]) -> float:
    """Processor time that a trial takes: by runs of its model by its contender, else by any, else by `SECONDS_A_STEP`."""
    of_model = [row for row in rows if row["trial"]["model"] == trial.model and row.get("seconds")]
    same = [row for row in of_model if row["trial"]["contender"] == trial.contender]
    times = 1.0 if same else TIMES.get(trial.contender, 1.0)
    a_step = [row["seconds"] / row["trial"]["steps"] for row in same or of_model]
    return trial.steps * times * statistics.median(a_step or [SECONDS_A_STEP[trial.model]])


def plan(names: Sequence[str], rows: Sequence[Row]) -> str:
    """A line for each study: its trials, how many are done, and the processor time of the others."""
    done = [row["trial"] for row in rows]
    lines = [f"{'study':<12} {'trials':>6} {'done':>5} {'seconds left':>13}"]
    total = 0.0
    for name in names:
        trials = STUDIES[name].trials
        missing = [trial for trial in trials if json.loads(json.dumps(asdict(trial))) not in done]
        seconds = sum(seconds_of(trial, rows) for trial in missing)
        total += seconds
        lines.append(f"{name:<12} {len(trials):>6} {len(trials) - len(missing):>5} {seconds:>13,.0f}")
    return "\n".join([*lines, f"{'together':<25} {total:>13,.0f}"])


def page(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["# The rate rule, measured", ""]
    lines += [f"- `python benchmarks/rate_rule.py run {quote(name)}`: {study.question}" for name, study in STUDIES.items()]
    lines += [
        "",
        "Differences are of the same seeds, with 95 % intervals by Student's t; negative is better.",
        "",
    ]
    for (model, steps), found in losses(rows).items():
        lines += section(model, steps, found, rows)
    return "\n".join([*lines, machine.line(), ""])
