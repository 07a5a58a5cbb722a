"""What is said of a comparison in words and files: notes on its rates, the table of its grids, the best rates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

from layerwise.lab.experiments.contenders import CompareConfig
from layerwise.lab.optimizers.default_rates import base_rates, plain_preset
from layerwise.lab.report import Contender, RateCurve


def notes(config: CompareConfig, curves: Sequence[RateCurve]) -> Iterator[str]:
    """What a reader has to know before the numbers: how the rates were chosen."""
    if any(len(curve.rates) > 1 for curve in curves):
        yield from _of_grids(config.compare.seeds, curves)
    else:
        yield _of_defaults(base_rates().get(plain_preset(config.model) or "", {}).get("command"))


def _of_grids(seeds: int, curves: Sequence[RateCurve]) -> Iterator[str]:
    yield (
        f"Each optimizer is shown at the best base rate of its grid, over {seeds} seed{'s' if seeds > 1 else ''}, all "
        "runs with the same schedule length. The rate was chosen by the same validation loss that is reported."
    )
    for curve in curves:
        if curve.edge is not None:
            yield (
                f"{curve.label}: the best rate, {curve.best:g}, is the {curve.edge} of its grid; its optimum may lie "
                "beyond it, so its result is not its best."
            )
        elif len(curve.rates) == 1:
            yield f"{curve.label}: only one rate was tried; it was not tuned."
        if curve.best is None:
            yield f"{curve.label}: diverged at every rate; it is shown at the lowest."


def _of_defaults(command: str | None) -> str:
    if command:
        return (
            "Base rates were not tuned in this run: they are the defaults for this model, found by "
            f"`{command}`. With other settings than those, the ranking may be one of rates, not of optimizers."
        )
    return (
        "Base rates were not tuned in this run: they are untuned starting values, so the ranking may be one of rates, "
        "not of optimizers. `layerwise compare --lr-grid auto` tunes each optimizer on its own grid."
    )


def curve_rows(curves: Sequence[RateCurve]) -> list[tuple[str, str, str]]:
    """Every rate of every grid with its losses over seeds, for a table."""
    return [
        (
            curve.label,
            f"{lr:g}",
            ", ".join(f"{v:.4f}" if math.isfinite(v) else "diverged" for v in curve.losses[lr]),
        )
        for curve in curves
        for lr in curve.rates
    ]


def rates_file(
    config: CompareConfig, contenders: Sequence[Contender], curves: Sequence[RateCurve], command: str
) -> str | None:
    """The best rates as an entry of default_rates.yaml; those at the end of a grid are left out.

    None where no rate was tuned, or where the model is no preset as it is, so that no entry could stand for it.
    """
    preset = plain_preset(config.model)
    if preset is None or not any(len(curve.rates) > 1 for curve in curves):
        return None
    lines = [f"{preset}:", f"  command: {json.dumps(command)}", "  rates:"]
    for contender, curve in zip(contenders, curves, strict=True):
        factors = contender.runs[0].config["optimizer"][
            "role_factors"
        ]  # of a contender tuned by role: no one rate
        if len(curve.rates) > 1 and curve.best is not None and curve.edge is None and not factors:
            lines.append(f"    {contender.optimizer}: {curve.best!r}")
    return "\n".join(lines) + "\n"
