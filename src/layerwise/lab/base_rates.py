"""Base learning rates where a config gives none: those found for a model preset, else the optimizer's own default."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from layerwise.lab.optimizers import OPTIMIZERS
from layerwise.lab.overrides import parse_yaml


@cache
def base_rates() -> Mapping[str, Mapping[str, Any]]:
    """The data file: model preset -> `rates` by optimizer, and the `command` that found them."""
    text = resources.files("layerwise.lab").joinpath("base_rates.yaml").read_text(encoding="utf-8")
    rates: dict[str, dict[str, Any]] = parse_yaml(text, "base_rates.yaml")
    return rates


def default_rate(model: str | None, optimizer: str) -> float:
    """The base rate of an optimizer by name: the data file's for this model preset, else its signature's."""
    known = base_rates().get(model or "", {}).get("rates", {})
    return float(known.get(optimizer, OPTIMIZERS[optimizer].lr))
