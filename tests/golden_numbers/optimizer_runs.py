"""Short runs of every optimizer, option and rate rule: name of the run -> what its weights and state are in the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fingerprint import digest, exact
from networks import tokens, zoo, zoo_backward, zoo_groups
from torch import nn

import layerwise as lw

STEPS = 8
Make = Callable[..., lw.LayerwiseOptimizer]


def preset(cls: Any, **options: Any) -> Make:
    return lambda model: cls(zoo_groups(model), **options)


def noise(**options: Any) -> Make:
    return preset(lw.Lanton, lr=0.01, rates=lw.NoiseAdaptive(**options))


def overridden(cls: Any, overrides: dict[str, Any], **options: Any) -> Make:
    return lambda model: cls(zoo_groups(model, **overrides), **options)


RUNS: dict[str, Make] = {
    "muon": preset(lw.Muon),
    "muon plain": preset(lw.Muon, nesterov=False, momentum=0.5, weight_decay=0.1, adamw_lr=0.01),
    "muon adamw options": preset(lw.Muon, adamw_betas=(0.8, 0.99), adamw_eps=1e-6),
    "muon with noise": preset(lw.Muon, rates=lw.NoiseAdaptive()),
    "d-muon": preset(lw.DMuon),
    "d-muon plain": preset(lw.DMuon, lr=0.01, nesterov=False, weight_decay=0.0),
    "d-muon with noise": preset(lw.DMuon, rates=lw.NoiseAdaptive(size_normalised=True)),
    "namo": preset(lw.DMuon, lr=0.01, rates=lw.NormAdaptive()),
    "namo options": preset(lw.DMuon, lr=0.01, rates=lw.NormAdaptive(beta2=0.9, eps=1e-3, ceiling=2.0)),
    "scion": preset(lw.Scion),
    "scion constrained": preset(lw.Scion, lr=0.01, weight_decay=1.0, radius={"hidden": 3.0, "head": 20.0}),
    "scion with noise": preset(lw.Scion, rates=lw.NoiseAdaptive(anchor="mean")),
    "signum": preset(lw.Signum, momentum=0.8, weight_decay=0.1),
    "signum with noise": preset(lw.Signum, rates=lw.NoiseAdaptive()),
    "lanton": preset(lw.Lanton),
    "lanton unit": preset(lw.Lanton, lr=0.01, scaling="unit", weight_decay=0.0),
    "lanton without noise": preset(lw.Lanton, rates=None),
    "static": preset(lw.Lanton, rates=lw.StaticRates({"up.weight": 0.5, "qkv.weight[1]": 0.25})),
    "noise previous_bf16": noise(reference="previous_bf16"),
    "noise momentum": noise(reference="momentum"),
    "noise independent": noise(reference="independent"),
    "noise alpha": noise(alpha=0.1),
    "noise alpha, mean, normalised": noise(alpha=0.1, anchor="mean", size_normalised=True),
    "noise floor": noise(floor=0.9, beta=0.5),
    "noise without memory": noise(beta=0.0),
    "tensor lr": lambda model: lw.Lanton(zoo_groups(model), lr=torch.tensor(0.01)),
    "tensor lr muon": lambda model: lw.Muon(zoo_groups(model), lr=torch.tensor(0.01), adamw_lr=torch.tensor(0.001)),
    "orthogonal": lambda model: lw.LayerwiseOptimizer(
        zoo_groups(model),
        {"hidden": {"scaling": "orthogonal"}, "default": {"scaling": "rms_0.2"}},
        lr=0.01,
        nesterov=True,
    ),
    "other geometries": overridden(
        lw.Lanton,
        {
            "up.weight": {"geometry": lw.RowNorm()},
            "square.weight": {"geometry": lw.ColNorm(), "norm_group": "mine"},
            "head.weight": {"geometry": lw.Frobenius(), "norm_group": "mine"},
            "embedding.weight": {"geometry": lw.Spectral(polar="svd", nuclear="svd")},
        },
    ),
    "polar methods": overridden(
        lw.Lanton,
        {
            "up.weight": {"geometry": lw.Spectral(polar="polar_express", nuclear="gram")},
            "square.weight": {"geometry": lw.Spectral(polar="quintic_tuned", nuclear="polar")},
        },
    ),
    "options by parameter": overridden(
        lw.Lanton,
        {
            "up.weight": {"momentum": 0.5, "lr": 0.02},
            "square.weight": {"update": "adamw", "betas": (0.5, 0.9)},
            "norm.*": {"rates": None, "radius": 2.0},
        },
    ),
    "skip": preset(lw.Lanton, nonfinite="skip"),
    "some gradients missing": preset(lw.Lanton),
    "some gradients missing namo": preset(lw.DMuon, rates=lw.NormAdaptive()),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
#: In bfloat16 only what treats it in a way of its own.
IN_BFLOAT16 = (
    "muon",
    "d-muon",
    "scion",
    "signum",
    "lanton",
    "namo",
    "noise momentum",
    "noise independent",
    "static",
)


def names() -> Iterator[tuple[str, str]]:
    for dtype in DTYPES:
        yield from ((run, dtype) for run in (IN_BFLOAT16 if dtype == "bfloat16" else RUNS))


def advance(run: str, model: nn.Module, optimizer: lw.LayerwiseOptimizer, steps: range) -> None:
    """Train on the batches of these steps, the gradients spoiled where the run is about that."""
    for step in steps:
        optimizer.zero_grad()
        first, second = tokens(step).chunk(2)
        zoo_backward(model, first, 2)
        if run == "noise independent":
            optimizer.hold_half()
        zoo_backward(model, second, 2)
        if run == "skip" and step == 3:
            model.up.weight.grad[0, 0] = math.nan
        if run.startswith("some gradients missing"):
            for p in list(model.parameters())[step % 3 :: 3]:
                p.grad = None
        optimizer.step()


def result(model: nn.Module, optimizer: lw.LayerwiseOptimizer) -> dict[str, Any]:
    """Digests of weights and state by parameter, and all that `layer_rates` says."""
    found = {}
    for name, p in model.named_parameters():
        state = {key: digest(value) for key, value in sorted(optimizer.state[p].items())}
        found[name] = {"weight": digest(p), **state}
    rates = {unit: [exact(number) for number in rate] for unit, rate in optimizer.layer_rates().items()}
    return {"parameters": found, "rates": digest(repr(sorted(rates.items())))}


def run(name: str, dtype: str) -> dict[str, Any]:
    """The whole run, and that going on from a saved state in the middle gives the same."""
    model = zoo(DTYPES[dtype])
    optimizer = RUNS[name](model)
    advance(name, model, optimizer, range(STEPS))
    return result(model, optimizer)


def saved(name: str, dtype: str, file: Path) -> None:
    """Train for half of the steps and save model and optimizer."""
    model = zoo(DTYPES[dtype])
    optimizer = RUNS[name](model)
    advance(name, model, optimizer, range(STEPS // 2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)


def resumed(name: str, dtype: str, file: Path) -> dict[str, Any]:
    """The second half, from the file that `saved` wrote."""
    state = torch.load(file, weights_only=True)
    model = zoo(DTYPES[dtype])
    model.load_state_dict(state["model"])
    optimizer = RUNS[name](model)
    optimizer.load_state_dict(state["optimizer"])
    advance(name, model, optimizer, range(STEPS // 2, STEPS))
    return result(model, optimizer)
