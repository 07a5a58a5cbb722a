"""Measured rates, recorder and FLeRM: name of the run -> rates with all digits, and digests of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fingerprint import digest, exact
from networks import Residual, drawn, features, residual_backward, tokens, zoo, zoo_backward, zoo_groups
from torch import nn

import layerwise as lw

DTYPES = {"float64": torch.float64, "float32": torch.float32}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "lanton": lambda m: lw.Lanton(lw.param_groups(m), lr=0.01, weight_decay=0.1),
    "muon": lambda m: lw.Muon(lw.param_groups(m), lr=0.01, weight_decay=0.1),
}
MEASURED: dict[str, dict[str, Any]] = {
    "kronecker": {"method": "kronecker", "probes": 32},
    "full_cov": {"method": "full_cov", "probes": 32},
    "iid": {"method": "iid", "probes": 32},
    "exact": {"method": "exact"},
    "log_softmax": {"method": "kronecker", "forward": "log_softmax", "probes": 8, "slices": 2},
    "one slice": {"method": "kronecker", "slices": 1, "probes": 5},
    "three slices": {"method": "kronecker", "slices": 3, "probes": 9},
}
MATCHED: dict[str, dict[str, Any]] = {
    "base": {"depth": {"blocks.*": "split"}},
    "copy": {"depth": {"blocks.*": "copy"}},
    "uniform": {"base": "uniform", "depth": {"blocks.*": 2}},
    "uniform, no depth": {"base": "uniform", "depth": {}},
    "every": {"depth": {"blocks.*": "split"}, "at": 0, "every": 2},
    "later": {"depth": {"blocks.*": "split"}, "at": 2, "max_change": 1.5, "fixed": ("inp.*",)},
    "base rates": {"depth": {"blocks.*": "split"}, "lr": "base"},
}
METHODS = ("kronecker", "full_cov", "iid", "exact")


def residual(width: int, blocks: int, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    return drawn(Residual(width, blocks), dtype, seed)


def numbers(rates: Any) -> dict[str, list[str]]:
    return {name: [exact(rate.value), exact(rate.stderr), exact(rate.share), rate.estimator] for name, rate in rates.items()}


def measured(dtype: str) -> dict[str, Any]:
    """`function_space_rates` of the update of one step, each method and option."""
    model = zoo(DTYPES[dtype])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    zoo_backward(model, tokens(0))
    lw.Lanton(zoo_groups(model), lr=0.01).step()
    update = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    model.load_state_dict(before)
    found = {
        name: numbers(lw.function_space_rates(model, update, tokens(1), **options)) for name, options in MEASURED.items()
    }
    mask = tokens(2) > 4
    found["mask"] = numbers(
        lw.function_space_rates(model, update, tokens(1), mask=mask, method="kronecker", probes=8, slices=2)
    )
    found["batches"] = numbers(
        lw.function_space_rates(model, update, [tokens(1), tokens(2)[:4]], method="kronecker", probes=8, slices=1)
    )
    return found


def recorded(dtype: str, optimizer: str, method: str = "kronecker") -> lw.FunctionSpaceRecorder:
    model = residual(8, 2, DTYPES[dtype])
    recorder = lw.FunctionSpaceRecorder(model, OPTIMIZERS[optimizer](model), every=2, method=method, probes=8, slices=2)
    for step in range(5):
        recorder.optimizer.zero_grad()
        residual_backward(model, step)
        with recorder.step(features(50 + step, DTYPES[dtype])):
            recorder.optimizer.step()
    return recorder


def records(dtype: str) -> dict[str, Any]:
    """What a recorder sees over five steps of each optimizer, and the weights, which it leaves alone."""
    found = {}
    for name in OPTIMIZERS:
        recorder = recorded(dtype, name)
        rows = {str(record.step): numbers(record.rates) for record in recorder.records}
        weights = {key: digest(p) for key, p in recorder.model.named_parameters()}
        found[name] = {"rates": rows, "weights": weights}
    return found


def matched(dtype: str, optimizer: str, method: str, mode: str, *, resume: bool = False) -> dict[str, Any]:
    """FLeRM over six steps of a wider and deeper model than its base; with `resume` through saved states in the middle."""
    options = {"base": lw.BaseRates.of(recorded(dtype, optimizer, method)), **MATCHED[mode]}

    def make() -> tuple[nn.Module, torch.optim.Optimizer, lw.FLeRM]:
        model = residual(16, 4, DTYPES[dtype], seed=1)
        own = OPTIMIZERS[optimizer](model)
        return model, own, lw.FLeRM(model, own, method=method, probes=8, slices=2, **options)

    model, own, flerm = make()
    for step in range(6):
        if resume and step == 3:
            states = model.state_dict(), own.state_dict(), flerm.state_dict()
            model, own, flerm = make()
            for part, state in zip((model, own, flerm), states, strict=True):
                part.load_state_dict(state)
        own.zero_grad()
        residual_backward(model, step)
        with flerm.step(features(80 + step, DTYPES[dtype])):
            own.step()
    lrs = {name: exact(lr) for name, lr in flerm.learning_rates().items()}
    return {"weights": {name: digest(p) for name, p in model.named_parameters()}, "lrs": lrs}


def matchings(dtype: str) -> dict[str, Any]:
    """Every mode under every method for one optimizer, and every optimizer in one mode; the last one resumed too."""
    found = {f"adamw, {mode}, {method}": matched(dtype, "adamw", method, mode) for mode in MATCHED for method in METHODS}
    found |= {f"{name}, every": matched(dtype, name, "kronecker", "every") for name in OPTIMIZERS}
    found |= {f"{name}, every, resumed": matched(dtype, name, "kronecker", "every", resume=True) for name in OPTIMIZERS}
    return found
