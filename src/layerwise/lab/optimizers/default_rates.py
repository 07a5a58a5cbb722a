"""Base learning rates where a config gives none: those found for a model preset, else the optimizer's own default."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import layerwise.lab.optimizers
from layerwise.lab.config.load import parse_yaml
from layerwise.lab.config.schema import ModelConfig
from layerwise.lab.models.families import PRESETS, model_settings
from layerwise.lab.optimizers.registry import OPTIMIZERS


@cache
def base_rates() -> Mapping[str, Mapping[str, Any]]:
    """The data file: model preset -> `rates` by optimizer, and the `command` that found them."""
    file = resources.files(layerwise.lab.optimizers).joinpath("default_rates.yaml")
    return parse_yaml(file.read_text(encoding="utf-8"), file.name)


def plain_preset(model: ModelConfig) -> str | None:
    """The preset that a model is, with every setting its own; None for any other model, to which its rates say nothing."""
    preset = model.preset
    return preset if preset in PRESETS and model_settings(model) == PRESETS[preset] else None


def default_rate(model: ModelConfig, optimizer: str) -> float:
    """The base rate of an optimizer by name: the data file's where the model is a preset as it is, else its signature's."""
    known = base_rates().get(plain_preset(model) or "", {}).get("rates", {})
    return float(known.get(optimizer, OPTIMIZERS[optimizer].default("lr")))
