"""The page that `roles_carried.py` writes: what there was to gain at each larger size, and what a method has of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]
Key = tuple[str, int, str, str | None]  # axis, size, method, rule
Losses = dict[tuple[float, tuple[tuple[str, float], ...]], list[float]]  # base rate and factors -> a loss a seed


def losses(rows: Sequence[Row]) -> dict[Key, Losses]:
    """Of all runs; a diverged one has an infinite loss."""
    found: dict[Key, Losses] = {}
    for row in rows:
        trial = row["trial"]
        key = (trial["axis"], trial["size"], trial["method"], trial["rule"])
        roles = tuple((role, factor) for role, factor in trial["roles"])
        value = math.inf if row["loss"] is None else row["loss"]
        found.setdefault(key, {}).setdefault((trial["lr"], roles), []).append(value)
    return found


def best(of: Losses) -> tuple[float, tuple[float, tuple[tuple[str, float], ...]]]:
    """The least mean loss and its point."""
    return min((fmean(values), point) for point, values in of.items())


def searched(of: Losses) -> list[str]:
    """What a search found: with one rate, and role by role."""
    one = best({point: values for point, values in of.items() if not point[1]})
    both = best(of)
    factors = ", ".join(f"{role} x {factor:g}" for role, factor in both[1][1]) or "no factor helped"
    return [
        f"one rate {one[0]:.3f} at {one[1][0]:.3g}",
        f"by role {both[0]:.3f} at {both[1][0]:.3g} ({factors})",
    ]


def section(
    axis: str, changed: str, sizes: tuple[int, int], methods: Mapping[str, str], found: Mapping[Key, Losses]
) -> list[str]:
    """One axis, along which the model is ``changed``."""
    small, large = sizes
    there = found[changed, large, "tuned", None]
    one = best({point: values for point, values in there.items() if not point[1]})[0]
    gain = one - best(there)[0]
    lines = [f"## {axis}, {small} to {large}", ""]
    for along, size, rule in ((axis, small, None), (axis, small, "dual_norm_adaptive"), (changed, large, None)):
        if (along, size, "tuned", rule) in found:
            on_top = ", the rule on top" if rule else ""
            lines.append(f"- Tuned at {size}{on_top}: {'; '.join(searched(found[along, size, 'tuned', rule]))}.")
    lines += [
        f"- So there are {gain:.3f} nats to gain at {large} by tuning role by role there. `gain` is what a method has of it"
        f" at the carried base rate, over one rate tuned at {large}.",
        "",
        "| method | at the carried rate | gain | best of three rates | with the rule on top, carried | best of three |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        plain, ruled = (found.get((axis, large, method, rule)) for rule in (None, "dual_norm_adaptive"))
        if plain is None:
            continue
        part = f"{(one - carried(plain)) / gain:.0%}" if gain > 0 else ""
        cells = [f"{carried(plain):.3f}", part, f"{best(plain)[0]:.3f} at {best(plain)[1][0]:.3g}"]
        cells += [f"{carried(ruled):.3f}", f"{best(ruled)[0]:.3f} at {best(ruled)[1][0]:.3g}"] if ruled else ["", ""]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]


def carried(of: Losses) -> float:
    """The mean loss at the middle one of the base rates, which is the small model's best."""
    points = sorted(of)
    return fmean(of[points[len(points) // 2]])


def page(
    rows: Sequence[Row], methods: Mapping[str, str], axes: Mapping[str, tuple[int, int]], changed: Mapping[str, str]
) -> str:
    """Markdown, of the axes that have been searched at both sizes. ``changed``: what the model is, where not the axis."""
    found = losses(rows)
    seeds = sorted({row["trial"]["seed"] for row in rows})
    lines = [
        "# Rates tuned by role on a small model, carried to a larger one",
        "",
        f"`python benchmarks/roles_carried.py run`: a Llama under D-Muon, {len(rows)} runs, seeds {seeds}; validation loss"
        " in nats, means over the seeds.",
        "",
        *(f"- **{method}**: {says}" for method, says in methods.items()),
        "",
    ]
    for axis, (small, large) in axes.items():
        along = changed.get(axis, axis)
        if (axis, small, "tuned", None) in found and (along, large, "tuned", None) in found:
            lines += section(axis, along, (small, large), methods, found)
    return "\n".join(lines)
