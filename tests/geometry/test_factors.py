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


def test_factors_are_taken_by_any_name():
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    tied[2].weight = tied[0].weight
    groups = lw.param_groups(torch.compile(tied), torch.arange(5), factors={"_orig_mod.1.weight": 0.5, "2.weight": 0.25})
    scales = {name: group["lr_scale"] for group in groups for name, _ in group["params"] if "lr_scale" in group}
    assert scales == {"0.weight": 0.25, "1.weight": 0.5}
    with pytest.raises(LayerwiseError, match=r"'0.weight' \(given 0.5\) has another name that is given too"):
        lw.param_groups(tied, torch.arange(5), factors={"0.weight": 0.5, "2.weight": 0.5})


def test_what_is_no_group_of_ours_is_told():
    model = network()
    plain = lw.torch_groups(lw.param_groups(model, BATCH), lr=0.1)
    for groups, lr, told in (
        (plain, 0.1, "a group of params, lr is none of lw.param_groups"),
        (model.parameters(), 0.1, r"give the groups that lw.param_groups\(model, batch\) returned"),
        (lw.param_groups(model, BATCH), -0.1, r"torch_groups\(lr=-0.1\): give a number from 0 on"),
    ):
        with pytest.raises(LayerwiseError, match=told):
            lw.torch_groups(groups, lr)


def test_width_factors_are_those_of_mup_but_for_its_readout():
    mup = pytest.importorskip("mup")

    class Layers(nn.Module):
        """Of each kind one: convolutions with groups, tables, attention, and a recurrent layer."""

        def __init__(self, width: int, readout: type[nn.Linear]) -> None:
            super().__init__()
            self.patches, self.depthwise = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3, groups=width)
            self.channels, self.some = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1, groups=4)
            self.positions = nn.Parameter(torch.zeros(16, width))
            self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)
            self.recurrent, self.head = nn.LSTM(width, width, batch_first=True), readout(width, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.some(self.channels(self.depthwise(self.patches(x)))).flatten(2).mT + self.positions
            return self.head(self.recurrent(self.block(x))[0])

    factors = lw.width_factors(Layers(32, nn.Linear), Layers(8, nn.Linear), torch.randn(2, 3, 8, 8))
    theirs = Layers(32, mup.MuReadout)
    mup.set_base_shapes(theirs, Layers(8, mup.MuReadout), delta=Layers(16, mup.MuReadout))
    groups = mup.MuAdam(theirs.parameters(), lr=1.0).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert factors == {name: rates[id(p)] for name, p in theirs.named_parameters()} | {"head.weight": 0.25}


def test_wrong_input_is_told():
    model = network()
    with pytest.raises(LayerwiseError, match=r"layer_decay\(decay=1.5\): give a number above 0 and at most 1"):
        lw.layer_decay(model, 1.5, BATCH)
    with pytest.raises(LayerwiseError, match=r"no parameter '2.wieght' \(given 0.5\): did you mean '2.weight'"):
        lw.param_groups(model, BATCH, factors={"2.wieght": 0.5})
    with pytest.raises(LayerwiseError, match=r"patterns are for overrides, {'2.\*': {'lr_scale'"):
        lw.param_groups(model, BATCH, factors={"2.*": 0.5})
    with pytest.raises(LayerwiseError, match=r"'2.weight' has -1.0: give a finite number from 0 on"):
        lw.param_groups(model, BATCH, factors={"2.weight": -1.0})
    with pytest.raises(LayerwiseError, match=r"base has no hidden '2.weight': give the same model"):
        lw.width_factors(network(), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), BATCH)
