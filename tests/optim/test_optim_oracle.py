"""Lanton against its literal twin, step by step, on a real GPT-2 (fused projections, Conv1D, tied head)."""

import math

import numpy as np
import oracle
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import layerwise as lw
from layerwise.geometry import Spectral

STEPS = 15
LR, DECAY, WIDTH, VOCAB = 0.01, 0.1, 12, 13
EXACT = Spectral(polar="svd", nuclear="svd")
FUSED = "transformer.h.0.attn.c_attn.weight"
#: Multipliers and noise are kept in float32. A square, a moving average of 15 terms and a sum over the group round at
#: most some 20 times, each by half of eps; roots only shrink a relative error.
RELATIVE = 10 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def start():
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=WIDTH,
        vocab_size=VOCAB,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).double()


def copy_of(model):
    made = GPT2LMHeadModel(model.config).double()
    made.load_state_dict(model.state_dict())
    return made


def units(named):
    """Parameter name -> array, to unit name -> [d_out, d_in] array, by what is known of GPT-2 alone."""
    found = {}
    for name, tensor in named.items():
        array = tensor.detach().numpy().copy()
        if name.endswith("c_attn.weight"):  # Conv1D: [in, 3 * out]
            for part, block in zip("qkv", np.split(array, 3, axis=1), strict=True):
                found[f"{name}[{part}]"] = block.T
        elif name.endswith(("c_proj.weight", "c_fc.weight", "wpe.weight")):
            found[name] = array.T
        else:
            found[name] = array
    return found


def kind(unit):
    if "wte" in unit:
        return "head"  # tied
    if "wpe" in unit:
        return "embedding"
    return "hidden" if "c_" in unit and "bias" not in unit else "vector"


def backward(model, generator, examples=8):
    ids = torch.randint(0, VOCAB, (examples, 12), generator=generator)
    return model(ids, labels=ids).loss


def gradients(model):
    return units({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


CASES = {
    "paper": {"alpha": 0.1},
    "paper, small alpha": {"alpha": 1e-3},
    "scale free": {"alpha": 0.0},
    "scale free, low floor": {"alpha": 0.0, "floor": 1e-6},
    "mean": {"alpha": 0.0, "anchor": "mean"},
    "group": {"alpha": 0.0, "group_alpha": 0.3},
    "group, mean": {"alpha": 0.0, "group_alpha": 1.0, "anchor": "mean", "size_normalised": True},
    "paper, mean": {"alpha": 0.1, "anchor": "mean"},
    "previous_bf16": {"alpha": 0.0, "reference": "previous_bf16"},
    "momentum": {"alpha": 0.1, "reference": "momentum"},
    "momentum, scale free": {"alpha": 0.0, "reference": "momentum", "anchor": "mean"},
    "independent": {"alpha": 0.0, "reference": "independent"},
    "independent, paper": {"alpha": 0.1, "reference": "independent"},
    "normalised": {"alpha": 0.0, "size_normalised": True},
    "normalised, paper": {"alpha": 0.01, "size_normalised": True, "beta": 0.5},
    "no memory": {"alpha": 0.0, "beta": 0.0},
}
GROUPS = {
    "unit": {"scaling": "unit"},
    "nesterov": {"nesterov": True},
    "no momentum": {"momentum": 0.0},
    "all": {"scaling": "unit", "nesterov": True, "momentum": 0.8},
}


def run(start, noise, options, missing=False):
    """Both side by side, compared after every step."""
    model = copy_of(start)
    momentum = options.get("momentum", 0.9)
    groups = lw.param_groups(model, overrides={"*.c_*.weight": EXACT})
    optimizer = lw.LayerwiseOptimizer(
        groups,
        lr=LR,
        weight_decay=DECAY,
        rates=lw.NoiseAdaptive(**noise),
        **{"scaling": "rms_0.2", "momentum": momentum} | options,
    )
    named = dict(model.named_parameters())
    first = units(named)
    twin = oracle.Lanton(
        first,
        {unit: kind(unit) for unit in first},
        lr=LR,
        momentum=momentum,
        weight_decay=DECAY,
        alpha=noise["alpha"],
        beta=noise.get("beta", 0.95),
        anchor=noise.get("anchor", "max"),
        reference=noise.get("reference", "previous"),
        normalised=noise.get("size_normalised", False),
        floor=noise.get("floor", 0.1),
        group_alpha=noise.get("group_alpha", 0.0),
        scaling=options.get("scaling", "rms_0.2"),
        nesterov=options.get("nesterov", False),
    )
    generator = torch.Generator().manual_seed(1)
    chance = np.random.default_rng(2)
    # No entry of a step is longer than lr * factor * 1 (spectral: |(U V^T)_ij| <= 1; the rest: RMS or largest entry
    # times the root of the size). Its error per step is RELATIVE of that, and decay only shrinks it.
    tolerance = STEPS * LR * 0.2 * math.sqrt(4 * WIDTH * 4) * RELATIVE
    for step in range(STEPS):
        optimizer.zero_grad()
        halves = None
        if noise.get("reference") == "independent":
            (backward(model, generator) / 2).backward()
            half = gradients(model)
            optimizer.hold_half()
            (backward(model, generator) / 2).backward()
            whole = gradients(model)
            halves = {unit: (2 * half[unit], 2 * (whole[unit] - half[unit])) for unit in whole}
        else:
            backward(model, generator).backward()
        for p in named.values():
            if missing and chance.random() < 0.3:
                p.grad = None
        grads = gradients(model)
        optimizer.step()
        twin.step(grads, halves)
        rates = optimizer.layer_rates()
        assert rates.keys() == twin.w.keys()
        for unit, weight in units(named).items():
            noise_here = twin.h.get(unit, math.nan)
            assert rates[unit].squared_norm == pytest.approx(noise_here, rel=RELATIVE, nan_ok=True), (step, unit)
            assert rates[unit].multiplier == pytest.approx(twin.multiplier[unit], rel=RELATIVE), (step, unit)
            assert rates[unit].lr == pytest.approx(LR * rates[unit].multiplier)
            np.testing.assert_allclose(weight, twin.w[unit], rtol=0, atol=tolerance, err_msg=f"{step} {unit}")
    return rates


@pytest.mark.parametrize("case", CASES)
def test_every_option_of_the_noise_follows_the_twin(start, case):
    rates = run(start, CASES[case], {})
    parts = [rates[f"{FUSED}[{part}]"] for part in "qkv"]
    assert len({rate.squared_norm for rate in parts}) == 3  # the parts of a fused projection are units of their own
    assert min(rate.multiplier for rate in rates.values()) < 0.99  # there was something to follow


@pytest.mark.parametrize("options", GROUPS)
def test_every_option_of_the_step_follows_the_twin(start, options):
    run(start, {"alpha": 0.0}, GROUPS[options])


@pytest.mark.parametrize("case", ["paper", "mean", "momentum", "scale free"])
def test_parameters_without_a_gradient_on_some_steps(start, case):
    run(start, CASES[case], {}, missing=True)


def test_the_multiplier_is_one_and_the_noise_unknown_before_the_first_difference(start):
    model = copy_of(start)
    optimizer = lw.Lanton(lw.param_groups(model))
    for rate in optimizer.layer_rates().values():
        assert math.isnan(rate.squared_norm)
        assert rate.multiplier == 1.0
    generator = torch.Generator().manual_seed(3)
    backward(model, generator).backward()
    optimizer.step()
    for rate in optimizer.layer_rates().values():
        assert math.isnan(rate.squared_norm)
        assert rate.multiplier == 1.0
        assert rate.lr == optimizer.param_groups[0]["lr"]
    optimizer.zero_grad()
    backward(model, generator).backward()
    optimizer.step()
    assert all(rate.squared_norm > 0 for rate in optimizer.layer_rates().values())
    assert min(rate.multiplier for rate in optimizer.layer_rates().values()) < 1


def test_the_rate_of_the_noisiest_of_two_layers_is_the_fourth_root():
    """The closed form: H of 16 : 1 in a group of two gives multipliers of 1/2 and 1."""
    quiet, loud = (torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)) for _ in range(2))
    with pytest.warns(UserWarning, match="shape"):
        optimizer = lw.Lanton([("quiet", quiet), ("loud", loud)])
    for sign in (1.0, -1.0):
        quiet.grad, loud.grad = sign * torch.eye(3).double(), 4 * sign * torch.eye(3).double()
        optimizer.step()
    rates = optimizer.layer_rates()
    assert rates["quiet"].multiplier == 1.0
    assert rates["loud"].multiplier == pytest.approx(0.5, rel=1e-3)  # 1e-3: `nuclear="auto"` is an estimate
    assert rates["loud"].squared_norm == pytest.approx((4 * 2 * 3) ** 2, rel=2e-3)
