"""Optimizers by name, their keywords checked against their signatures, and their rates where a config gives none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import layerwise.lab.optimizers
import layerwise.optim as lw
from layerwise.common.group_by import group_by
from layerwise.errors import LayerwiseError
from layerwise.geometry import describe, param_groups
from layerwise.lab.config.keys import check_arguments, nearest
from layerwise.lab.config.load import parse_yaml
from layerwise.lab.config.schema import ModelConfig, OptimizerConfig, TrainingConfig
from layerwise.lab.models.families import PRESETS, model_settings
from layerwise.lab.optimizers.torch_muon import TorchMuon
from layerwise.lab.runs.directory import read_run
from layerwise.lab.runs.recorded import number


def lab_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Groups of `param_groups` that decay GPT-2's positions, as its other contender does: AdamW in its usual groups."""
    groups = param_groups(model)
    for group in groups:
        if group["role"] == "embedding":
            group.pop("weight_decay", None)
    return groups


@dataclass(frozen=True)
class Preset:
    """An optimizer a config can name."""

    title: str  # in tables and figures
    build: Callable[..., Optimizer]  # (groups of a model, lr=, weight_decay=, keywords)
    groups: Callable[[nn.Module], Iterable[Any]] = lab_groups
    rule: str | None = None  # layer rates it has by definition
    weight_decay: float | None = None  # by default; None: its signature's

    def keywords(self) -> set[str]:
        """The names a config may give besides those that every optimizer has."""
        parameters = inspect.signature(self.build).parameters.values()
        named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
        return named - {"self", "params", "lr", "weight_decay", "rates"} - _NOT_SETTINGS

    def default(self, key: str) -> float:
        """Of its signature's `lr` or `weight_decay`; 0 where it has none."""
        parameter = inspect.signature(self.build).parameters.get(key)
        return 0.0 if parameter is None or parameter.default is parameter.empty else float(parameter.default)

    @property
    def decay(self) -> float:
        """The default weight decay."""
        return self.default("weight_decay") if self.weight_decay is None else self.weight_decay

    @property
    def takes_rates(self) -> bool:
        return "rates" in inspect.signature(self.build).parameters

    def rule_in(self, rates: Mapping[str, Any]) -> str:
        """The rule of a config's `rates`, by name."""
        return str(rates.get("rule") or self.rule or "noise_adaptive")


# Implementation switches of torch's optimizers that a config has no use for.
_NOT_SETTINGS = {"foreach", "maximize", "capturable", "differentiable", "work"}


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices in one group, gains and biases in another without weight decay: the usual groups of AdamW."""
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim < 2]["params"].append((name, p))
    return [group for group in groups if group["params"]]


_TORCHS = {
    "adamw": Preset("AdamW", torch.optim.AdamW, decay_groups, weight_decay=0.1),
    "torch-muon": Preset("torch Muon", TorchMuon),
}


RULES = lw.rate_rules()


def optimizers() -> dict[str, Preset]:
    """torch's optimizers, and every one that is registered with the library by now."""
    rules: dict[Any, str] = {kind: rule for rule, kind in RULES.items()}
    registered = lw.optimizers().items()
    return _TORCHS | {name: Preset(each.title, each.build, rule=rules.get(each.rates)) for name, each in registered}


def find_preset(config: OptimizerConfig, section: str = "optimizer") -> Preset:
    """The preset a config names, its keywords checked. Raises LayerwiseError naming the key in `section` and the nearest."""
    preset = optimizers().get(config.name)
    if preset is None:
        raise LayerwiseError(f"{section}.name={config.name!r}: {nearest(config.name, optimizers())}")
    known = preset.keywords() | set(type(config).model_fields)
    check_arguments(preset.build, _arguments(config.settings), known, section, config.name)
    if config.rates is None:
        return preset
    if not preset.takes_rates:
        able = ", ".join(name for name, other in optimizers().items() if other.takes_rates)
        raise LayerwiseError(f"{section}.rates: {config.name} has no layer rates; those that have: {able}")
    rule = preset.rule_in(config.rates)
    if rule not in RULES:
        raise LayerwiseError(f"{section}.rates.rule={rule!r}: {nearest(rule, RULES)}")
    given = {key: value for key, value in _arguments(config.rates).items() if key != "rule"}
    if isinstance(given.get("multipliers"), str):  # a run, whose multipliers they are
        given["multipliers"] = {}
    check_arguments(RULES[rule], given, inspect.signature(RULES[rule]).parameters, f"{section}.rates", f"rule {rule}")
    return preset


def _arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config's lists as the tuples that optimizers take."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def with_defaults(config: OptimizerConfig, lr: float | None = None) -> OptimizerConfig:
    """The config with rate and decay written out, so that the record of a run holds them.

    `lr` is the rate where the config gives none; None: that of the optimizer's signature.
    """
    preset = find_preset(config)
    default = preset.default("lr") if lr is None else lr
    decay = preset.decay if config.weight_decay is None else config.weight_decay
    return config.model_copy(update={"lr": default if config.lr is None else config.lr, "weight_decay": decay})


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
    return float(known.get(optimizer, optimizers()[optimizer].default("lr")))


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer of a config for a model's trainable parameters. Raises LayerwiseError.

    Where the config gives no rate it is the signature's: rates found for a model preset come in by `train.complete`.
    """
    config = with_defaults(config)
    preset = find_preset(config)
    keywords = _arguments(config.settings)
    if preset.takes_rates and (config.rates is not None or preset.rule is not None):
        keywords["rates"] = _build_rule(preset, config.rates or {})
    try:
        groups = scale_roles(model, preset.groups(model), config.lr or 0.0, config.role_factors)
        return preset.build(groups, lr=config.lr, weight_decay=config.weight_decay, **keywords)
    except LayerwiseError:
        raise
    except (ValueError, TypeError, IndexError) as error:  # the last: a list shorter than the optimizer expects
        given = ", ".join(f"optimizer.{key}={value}" for key, value in config.settings.items())
        raise LayerwiseError(f"{given or 'optimizer'}: {config.name} does not take that: {error}") from None


def scale_roles(
    model: nn.Module, groups: Iterable[dict[str, Any]], lr: float, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The groups of named parameters, cut so that every role in `factors` has groups of its own at `lr * factor`.

    What muP prescribes for Adam is `{hidden: 1/w, head: 1/w}`.

    Raises LayerwiseError for a role that the model has no parameter of.
    """
    if not factors:
        return list(groups)
    roles = {row.name: row.role for row in describe(model).rows}
    for role in factors:
        if role not in roles.values():
            raise LayerwiseError(f"optimizer.role_factors: {role!r}: {nearest(role, set(roles.values()))}")
    cut: list[dict[str, Any]] = []
    for group in groups:
        for factor, params in group_by(group["params"], lambda named: factors.get(roles[named[0]], 1.0)).items():
            cut.append({**group, "params": params} | ({} if factor == 1.0 else {"lr": lr * factor}))
    return cut


def _build_rule(preset: Preset, rates: dict[str, Any]) -> lw.RateRule:
    name = preset.rule_in(rates)
    keywords = {key: value for key, value in rates.items() if key != "rule"}
    if isinstance(multipliers := keywords.get("multipliers"), str):
        keywords["multipliers"] = mean_multipliers(multipliers)
    try:
        return RULES[name](**keywords)
    except (TypeError, ValueError) as error:
        named = "" if isinstance(error, LayerwiseError) else f"{name}: "
        raise LayerwiseError(f"optimizer.rates: {named}{error}") from None


def mean_multipliers(run: str) -> dict[str, float]:
    """Unit -> the mean of its multiplier over a run's records: the static control of an adaptive rule."""
    seen: dict[str, list[float]] = {}
    for row in read_run(run).layers:
        for name, entry in (row.get("layers") or {}).items():
            if math.isfinite(multiplier := number(entry.get("multiplier"))):
                seen.setdefault(name, []).append(multiplier)
    if not seen:
        raise LayerwiseError(f"optimizer.rates.multipliers: run {run} recorded no layer rates")
    return {name: sum(multipliers) / len(multipliers) for name, multipliers in seen.items()}


def rules_of(optimizer: Optimizer) -> list[lw.RateRule]:
    """The rate rules of its groups: torch's optimizers have none."""
    return [group["rates"] for group in optimizer.param_groups if group.get("rates") is not None]


def check_batch(training: TrainingConfig, optimizer: Optimizer, world: int) -> None:
    """Raises LayerwiseError where a batch cannot be shared out over `world` processes, or not as the noise rule needs."""
    rules, sequences = rules_of(optimizer), training.batch_size // training.accumulation
    if any(rule.needs_halves for rule in rules) and training.accumulation % 2:
        raise LayerwiseError(
            "optimizer.rates.reference=independent compares the two halves of the accumulated batch:"
            f" training.accumulation={training.accumulation} must be even"
        )
    if sequences < world:
        raise LayerwiseError(
            f"training.batch_size={training.batch_size} in training.accumulation={training.accumulation} parts"
            f" leaves {sequences} a part, fewer than {world} processes: raise the batch size, or lower the"
            " accumulation or the number of processes"
        )
    replicas = any(rule.needs_replicas for rule in rules)
    if replicas and world == 1:
        raise LayerwiseError(
            "optimizer.rates.reference=replicas compares the gradients of data-parallel processes, and this run has one:"
            " give independent (two halves of the accumulated batch) or previous, or launch several processes"
        )
    if replicas and sequences % world:
        raise LayerwiseError(
            "optimizer.rates.reference=replicas compares equal shares of a batch: training.batch_size /"
            f" training.accumulation = {sequences} sequences are not a multiple of {world} processes"
        )
