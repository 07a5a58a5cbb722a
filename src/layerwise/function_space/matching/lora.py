"""LoRA in one call: learning rates for the adapters of a peft model that were tuned at another rank or alpha."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from layerwise.common.checked import PositiveInt, checked
from layerwise.common.parameter_names import unwrap, unwrap_optimizer
from layerwise.common.running import undisturbed
from layerwise.errors import LayerwiseError
from layerwise.function_space.matching.decide import Factor, Matched, MatchReport, decide, fixed_parameters, rounding_noise
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.measuring.outputs import Forward
from layerwise.function_space.measuring.process_group import processes_of
from layerwise.function_space.steps.named_rates import (
    UNSCHEDULED,
    NamedRates,
    group_rate,
    learning_rates,
    optimized,
    require_linear,
)
from layerwise.function_space.steps.step_loss import Loss, given_loss, model_loss
from layerwise.function_space.steps.watched_step import WatchedStep


class LoraMatch(NamedRates):
    """Matched rates of adapters, which apply whenever the optimizer steps.

    Attributes:
        report: what was measured and decided for each parameter.
        multipliers: of the groups' rates, by parameter name.
    """

    def __init__(self, report: MatchReport, optimizer: Optimizer, model: nn.Module) -> None:
        super().__init__(optimizer, model)
        self.report = report
        self.take({name: row.change for name, row in report.rows.items()})

    def state_dict(self) -> dict[str, Any]:
        """The multipliers, for a resumed run to take instead of matching again."""
        return {"multipliers": dict(self.multipliers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave; multipliers of other parameters are refused."""
        self.take(state["multipliers"])

    def __str__(self) -> str:
        return str(self.report)


@checked
def match_lora(
    model: nn.Module,
    optimizer: Any,
    batches: Sequence[Any],
    base_rank: PositiveInt,
    base_alpha: float | None = None,
    *,
    at: int = 4,
    loss: Loss | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    fixed: Sequence[str] = (),
    max_change: Factor | None = None,
    forward: Forward | str | None = None,
    method: str = "full_cov",
    probes: PositiveInt = 64,
    **options: Any,
) -> LoraMatch:
    """Rates for a model's LoRA adapters at which they move its outputs as adapters of another rank and alpha do.

    Call it once, before training. Fresh adapters of `base_rank` and fresh ones like the model's own each take `at` steps
    on `batches`, at the optimizer's rates; then one more step is measured, on the batches left. From then on every
    parameter of the adapters has its rate times `base / own`. Training adapters, the optimizer's state, random numbers
    and gradients are as before; the frozen weights are shared and never written.

    Args:
        model: of peft, with one active LoRA adapter.
        optimizer: over its parameters, with the rates that were tuned at `base_rank`.
        batches: at least `at + 2` dicts of keyword arguments with labels (else give `loss` and `forward`).
        base_rank: the rank that the rates were tuned at.
        base_alpha: the alpha that they were tuned at; default the model's own.
        at: the step that is matched, from 0 on. Not 0: B is 0 then, and A without effect.
        loss: `loss(model, batch)`. Default: the model's own.
        seeds: of the fresh adapters that rates are averaged over.
        fixed: name patterns of parameters that keep their rates, such as `("*lora_A*",)`.
        max_change: largest factor, up or down.
        forward: see `Measurement`.
        method: see `Measurement`.
        probes: see `Measurement`.
        options: the other fields of `Measurement`.

    Raises:
        LayerwiseError: for what is no such model, too few batches, or an optimizer not proportional to lr.

    Examples:
        >>> match = lw.match_lora(model, optimizer, batches, base_rank=8)  # doctest: +SKIP
        >>> print(match)  # doctest: +SKIP
    """
    require_linear(optimizer)
    model, optimizer = unwrap(model), unwrap_optimizer(optimizer)
    _, config = _adapter_of(model)
    _check(batches, at, seeds)
    parameters = optimized(model, optimizer)
    rates = partial(
        _trial_rates, model, optimizer, list(batches), at,
        model_loss if loss is None else partial(given_loss, loss), seeds,
        Measurement(forward, method, probes, **{"linear": None, **options}),
    )  # fmt: skip
    base_config = copy.deepcopy(config)
    base_config.r, base_config.lora_alpha = base_rank, config.lora_alpha if base_alpha is None else base_alpha
    with undisturbed(model), torch.enable_grad():
        targets, measured = rates(base_config), rates(copy.deepcopy(config))
    kept = {name: "kept: no part of the adapter" for name in parameters if name not in measured}
    negligible = {**kept, **fixed_parameters(parameters, fixed)}
    measured, targets = ({**dict.fromkeys(kept, 0.0), **found} for found in (measured, targets))
    noise = rounding_noise({p.dtype for p in parameters.values()})
    decided = decide(measured, targets, negligible, noise, max_change)
    lrs = learning_rates(optimizer, parameters, UNSCHEDULED)
    rows = {
        name: Matched(measured[name], targets[name], change, lrs[name] * change, note)
        for name, (change, note) in decided.items()
    }
    report = MatchReport(at, rows)
    report.warn_of_odd("match_lora", "report")
    return LoraMatch(report, optimizer, model)


def _trial_rates(
    model: nn.Module,
    optimizer: Optimizer,
    batches: list[Any],
    at: int,
    loss: Loss,
    seeds: Sequence[int],
    measurement: Measurement,
    config: Any,
) -> dict[str, float]:
    """Rates of step `at` of fresh adapters with a config, by the names of the model's own, averaged over seeds."""
    adapter, found = _adapter_of(model)[0], []
    for seed in seeds:
        with trial_adapter(model, config, seed):
            trial = twin(optimizer, model, adapter)
            for number, batch in enumerate(batches[: at + 1]):
                if number:
                    trial.step()
                trial.zero_grad()
                loss(model, batch).backward()
            with WatchedStep(model, trial, None).surrounded() as step:
                trial.step()
            found.append(step.rates(measurement, batches[at + 1 :], seed=measurement.seed + seed))
    return {renamed(name, TRIAL, adapter): fmean(rates[name].value for rates in found) for name in found[0]}


def _adapter_of(model: nn.Module) -> tuple[str, Any]:
    configs, active = getattr(model, "peft_config", None), getattr(model, "active_adapter", None)
    if not isinstance(configs, Mapping) or not isinstance(active, str) or active not in configs:
        raise LayerwiseError(
            f"model is {type(model).__name__}: match_lora needs a model of peft with one active adapter, as "
            "get_peft_model makes it"
        )
    config = configs[active]
    if not hasattr(config, "r") or not hasattr(config, "lora_alpha"):
        raise LayerwiseError(f"the active adapter {active!r} is a {type(config).__name__}: match_lora needs LoRA")
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if getattr(config, key, None)]
    if patterns:
        raise LayerwiseError(f"the adapter's {patterns[0]} gives modules ranks of their own: use FLeRM with a base file")
    if config.init_lora_weights not in (True, "gaussian", "orthogonal"):
        raise LayerwiseError(
            f"init_lora_weights={config.init_lora_weights!r} writes into the frozen weights: use True or 'gaussian', or "
            "FLeRM with a base file"
        )
    return active, config


def _check(batches: Sequence[Any], at: int, seeds: Sequence[int]) -> None:
    if at < 1:
        raise LayerwiseError(f"at is {at}: use 1 or more (in step 0 B is 0, and A moves nothing)")
    if len(batches) < at + 2:
        raise LayerwiseError(f"{len(batches)} batches: give at least {at + 2}, for {at + 1} steps and to measure on")
    if not seeds:
        raise LayerwiseError("seeds is empty: give at least one")
    if processes_of("auto").count > 1:
        raise LayerwiseError(
            "match_lora runs on one process: call it there, and load its state_dict() into the others' optimizers"
        )


#: The name of the fresh adapter.
TRIAL = "layerwise_trial"
#: What of a group concerns the model's own parameters, or where its schedule stands.
_OWN = frozenset(("params", "param_names", "lr", "initial_lr", "step", "k", "momentum_steps", "rate_steps"))


def renamed(name: str, old: str, new: str) -> str:
    """A parameter's name with another adapter's: `...lora_A.default.weight`."""
    return ".".join(new if part == old else part for part in name.split("."))


@contextmanager
def trial_adapter(model: Any, config: Any, seed: int) -> Iterator[None]:
    """A fresh adapter, drawn from a seed, alone active and alone trainable."""
    active = model.active_adapter
    torch.manual_seed(seed)
    try:
        model.add_adapter(TRIAL, config)
    except ValueError as error:
        raise LayerwiseError(
            f"peft refuses a second adapter beside {active!r} ({error}): use FLeRM with a base file"
        ) from None
    try:
        model.set_adapter(TRIAL)
        for name, p in model.named_parameters():
            if TRIAL not in name.split("."):
                p.requires_grad_(False)
        model.train(model.training)
        yield
    finally:
        model.set_adapter(active)  # peft warns where an active one is deleted
        model.delete_adapter(TRIAL)


def twin(optimizer: Optimizer, model: nn.Module, adapter: str) -> Optimizer:
    """A new optimizer of the same class and options over the trial adapter, at the rates without a schedule.

    Raises:
        LayerwiseError: the class cannot be built from groups alone.
    """
    named = dict(model.named_parameters())
    names = {id(p): name for name, p in named.items()}
    groups = []
    for group in optimizer.param_groups:
        own = [renamed(names[id(p)], adapter, TRIAL) for p in group["params"] if id(p) in names]
        held = [name for name in own if name in named and TRIAL in name.split(".")]
        if held:
            kept = {key: value for key, value in group.items() if key not in _OWN}
            if "param_names" in group:
                kept["param_names"] = held
            groups.append({**kept, "params": [named[name] for name in held], "lr": group_rate(group, UNSCHEDULED)})
    if not groups:
        raise LayerwiseError(f"the optimizer holds no parameter of the adapter {adapter!r}: make it of this model's")
    kind: Any = type(optimizer)
    try:
        return cast(Optimizer, kind(groups))
    except TypeError as error:
        raise LayerwiseError(
            f"{type(optimizer).__name__} cannot be built from parameter groups alone ({error}): use FLeRM with a base file"
        ) from None
