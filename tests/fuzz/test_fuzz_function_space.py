"""Random networks and updates: the exact rates are those of forward-mode differentiation."""

from __future__ import annotations

import torch
from cases import Share, cases, run
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jvp

import layerwise as lw

ACTS = {"tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU, "norm": None}


def made(sizes: list[int], acts: list[str], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for d_in, d_out, act in zip(sizes, sizes[1:], acts, strict=False):
        layers += [nn.Linear(d_in, d_out), nn.LayerNorm(d_out) if ACTS[act] is None else ACTS[act]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 3)).double()


def check(sizes: list[int], acts: list[str], seed: int, batch: int, scale: float) -> None:
    model = made(sizes, acts * 4, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    update = {name: scale * torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in weights.items()}
    inputs = torch.randn(batch, sizes[0], generator=generator, dtype=torch.float64)
    found = lw.function_space_rates(model, update, inputs, method="exact")
    for name, direction in update.items():

        def outputs(value: Tensor, name: str = name) -> Tensor:
            return functional_call(model, {**weights, name: value}, (inputs,))

        _, change = jvp(outputs, (weights[name],), (direction,))
        wanted = change.square().mean().sqrt().item()
        # float64: products of at most a few dozen terms, twice
        assert abs(found[name].value - wanted) <= 1e-9 * wanted + 1e-12 * scale, name
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name])


@cases(short=15, long=2000)
def test_exact_rates_are_those_of_jvp(share: Share) -> None:
    run(
        share, check, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 9999),
        acts=st.lists(st.sampled_from(sorted(ACTS)), min_size=1, max_size=2), batch=st.integers(1, 5),
        scale=st.sampled_from([1.0, 1e-3, 1e3]),
    )  # fmt: skip
