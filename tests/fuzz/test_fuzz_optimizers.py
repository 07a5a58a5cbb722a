"""Random models under every optimizer and precision: finite weights, or one line; a state that loads goes on alike."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from cases import Share, cases, one_line, run
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

import layerwise as lw
from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import OptimizerConfig
from layerwise.lab.optimizers.registry import build_optimizer, optimizers

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
RULES = [None, "noise_adaptive", "norm_adaptive", "dual_norm_adaptive"]
#: torch's AdamW and Muon keep eps in the weights' precision, where 1e-8 is 0 in float16; the lab's weights are float32.
TORCHS = {"adamw", "torch-muon"}
LAYERS = {
    "linear": lambda n: nn.Linear(n, n), "thin": lambda n: nn.Sequential(nn.Linear(n, 1), nn.Linear(1, n)),
    "norm": nn.LayerNorm, "conv": lambda n: nn.Sequential(nn.Unflatten(1, (1, n)), nn.Conv1d(1, 2, 1), nn.Flatten(),
                                    nn.Linear(2 * n, n)),
    "frozen": lambda n: nn.Linear(n, n).requires_grad_(False), "gelu": lambda n: nn.GELU(),
}  # fmt: skip


def made(layers: list[str], width: int, dtype: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), *(LAYERS[name](width) for name in layers)).to(DTYPES[dtype])


def step(model: nn.Module, optimizer: Any, number: int, width: int, dtype: str, spoil: str) -> None:
    inputs = torch.randn(3, width, generator=torch.Generator().manual_seed(number)).to(DTYPES[dtype])
    model(inputs).float().square().mean().backward()
    if spoil == "zero":
        for p in model.parameters():
            p.grad = None if p.grad is None else torch.zeros_like(p.grad)
    if spoil == "none":
        next(model.parameters()).grad = None
    optimizer.step()
    optimizer.zero_grad()


def check(layers: list[str], width: int, dtype: str, name: str, rule: str | None, spoil: str) -> None:
    assume(dtype != "float16" or name not in TORCHS)
    rates = None if rule is None or not optimizers()[name].takes_rates else {"rule": rule}
    settings = OptimizerConfig(name=name, rates=rates, lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = made(layers, width, dtype)
            optimizer = build_optimizer(model, settings)
            for number in range(2):
                step(model, optimizer, number, width, dtype, spoil)
            other = copy.deepcopy(model)
            again = build_optimizer(other, settings)
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for one, its in ((model, optimizer), (other, again)):
                step(one, its, 2, width, dtype, "")
        except LayerwiseError as error:
            one_line(error)
            return
    for (key, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.isfinite(a).all(), key
        assert torch.equal(a, b), key
    if isinstance(optimizer, lw.LayerwiseOptimizer):
        assert all(rate.multiplier >= 0 for rate in optimizer.layer_rates().values())


@cases(short=25, long=4000)
def test_any_model(share: Share) -> None:
    run(
        share, check, layers=st.lists(st.sampled_from(sorted(LAYERS)), max_size=3), width=st.integers(1, 6),
        dtype=st.sampled_from(sorted(DTYPES)), name=st.sampled_from(sorted(optimizers())),
        rule=st.sampled_from(RULES), spoil=st.sampled_from(["", "", "zero", "none"]),
    )  # fmt: skip
