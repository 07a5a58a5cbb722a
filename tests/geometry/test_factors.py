"""Fixed rates by depth and width, and the groups that any optimizer takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import layerwise as lw
from layerwise.errors import LayerwiseError


def network(width: int = 8, blocks: int = 1) -> nn.Sequential:
    middle = [module for _ in range(blocks) for module in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), *middle, nn.Linear(width, 2))


BATCH = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def moved(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """What one step changes, with the same gradients whatever the optimizer."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [lw.DualMuon, lw.Lanton, lw.Signum, lw.Scion])
def test_a_factor_scales_the_steps_of_an_optimizer_of_ours(make):
    """The first step of each is its rate times something that does not depend on it."""
    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    factors = lw.layer_decay(model, 0.5, BATCH)
    plain = moved(make(lw.param_groups(twin, BATCH), weight_decay=0.0), twin)
    scaled = moved(make(lw.param_groups(model, BATCH, factors=factors), weight_decay=0.0), model)
    for name, change in scaled.items():
        # float32: differences of weights of about 1, whose last digit is 6e-8
        torch.testing.assert_close(change, plain[name] * factors[name], rtol=1e-3, atol=2e-7)


def test_a_factor_scales_torchs_adamw():
    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    factors = lw.layer_decay(model, 0.5, BATCH)
    groups = lw.torch_groups(lw.param_groups(model, BATCH, factors=factors), lr=1e-2)
    assert not any(set(group) - {"params", "lr", "weight_decay"} for group in groups)
    plain = moved(torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0), twin)
    scaled = moved(torch.optim.AdamW(groups, weight_decay=0.0), model)
    for name, change in scaled.items():
        torch.testing.assert_close(change, plain[name] * factors[name], rtol=1e-4, atol=2e-7)


def test_what_shares_everything_is_one_group_and_own_options_stay():
    model = network()
    overrides = {"2.weight": {"betas": (0.5, 0.9)}, "0.*": {"lr": 0.5, "lr_scale": 0.5}}
    groups = lw.torch_groups(lw.param_groups(model, BATCH, overrides), lr=0.1)
    found = {len(group["params"]): group for group in groups}
    assert [group["lr"] for group in groups] == [0.25, 0.25, 0.1, 0.1, 0.1]
    assert found[2]["weight_decay"] == 0.0  # the two biases of one rate
    assert [group["betas"] for group in groups if "betas" in group] == [(0.5, 0.9)]


def test_factors_multiply_one_another_and_an_override():
    groups = lw.param_groups(
        network(), BATCH, {"role:hidden": {"lr_scale": 0.5}}, factors=[{"2.weight": 0.5, "0.bias": 3.0}, {"2.weight": 0.5}]
    )
    scales = {name: group.get("lr_scale", 1.0) for group in groups for name, _ in group["params"]}
    assert scales["2.weight"] == 0.125
    assert (scales["0.weight"], scales["0.bias"], scales["2.bias"], scales["4.weight"]) == (0.5, 3.0, 1.0, 1.0)


def test_the_head_of_dual_muon_keeps_its_three_times():
    optimizer = lw.DualMuon(lw.param_groups(network(), BATCH, factors={"4.weight": 0.5}), lr=0.01)
    assert next(group["lr_scale"] for group in optimizer.param_groups if group["role"] == "head") == 1.5


def test_what_is_unfrozen_later_gets_its_factor():
    model = network()
    model[0].requires_grad_(False)
    optimizer = lw.Signum(lw.param_groups(model, BATCH, factors=lw.layer_decay(model, 0.5, BATCH)), lr=0.1)
    model[0].requires_grad_(True)
    optimizer.add_trainable(model, BATCH)
    scales = {n: group.get("lr_scale", 1.0) for group in optimizer.param_groups for n in group["param_names"]}
    assert scales == {"4.weight": 1.0, "4.bias": 1.0, "2.weight": 0.5, "2.bias": 0.5, "0.weight": 0.25, "0.bias": 0.25}


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_width_factors_are_one_over_the_ratio_of_inputs(small, times, blocks):
    factors = lw.width_factors(network(small * times, blocks), network(small, blocks), BATCH)
    hidden = {f"{2 * i + 2}.weight": 1 / times for i in range(blocks)}
    inside = {"0.weight": 1.0, **hidden, f"{2 * blocks + 2}.weight": 1 / times}
    assert factors == pytest.approx({name: inside.get(name, 1.0) for name in factors})


def test_width_factors_of_stored_and_fused_matrices_and_further_blocks():
    transformers = pytest.importorskip("transformers")

    def gpt2(width: int, blocks: int) -> nn.Module:
        words = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=width, n_layer=blocks, n_head=2, **words))

    factors = lw.width_factors(gpt2(64, 3), gpt2(16, 2))
    quarter = {name for name, factor in factors.items() if factor == 0.25}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert quarter == {"transformer.wte.weight", *(f"transformer.h.{i}.{kind}.weight" for i in range(3) for kind in kinds)}
    assert {factor for name, factor in factors.items() if name not in quarter} == {1.0}


def test_wrong_input_is_told():
    model = network()
    with pytest.raises(LayerwiseError, match=r"layer_decay\(decay=1.5\): give a number above 0 and at most 1"):
        lw.layer_decay(model, 1.5, BATCH)
    with pytest.raises(LayerwiseError, match=r"no parameter '2.wieght' \(given 0.5\): did you mean '2.weight'"):
        lw.param_groups(model, BATCH, factors={"2.wieght": 0.5})
    with pytest.raises(LayerwiseError, match=r"'2.weight' has -1.0: give a finite number from 0 on"):
        lw.param_groups(model, BATCH, factors={"2.weight": -1.0})
    with pytest.raises(LayerwiseError, match=r"base has no hidden '2.weight': give the same model"):
        lw.width_factors(network(), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), BATCH)
