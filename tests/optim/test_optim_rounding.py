"""Weights in half precision: decay and step are rounded once, or at random without bias; steps that vanish are said."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same_bits, make, net, set_gradients, tensors
from torch import nn

import layerwise as lw
from layerwise.optim.rounding import stochastically

PRESETS = ("muon", "d-muon", "scion", "signum", "lanton")


def one_matrix(preset, start, **options):
    weight = nn.Parameter(start.clone())
    group = {"params": [("w", weight)], "role": "hidden", "layout": lw.MatrixLayout(), "geometry": lw.Sign()}
    return weight, preset([group], **options)


@pytest.mark.filterwarnings("ignore:.*half precision")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [0.0078125, torch.tensor(0.0078125)], ids=["number", "tensor"])
@pytest.mark.parametrize("decay", [0.125, 0.5])
def test_decay_and_step_are_rounded_once(dtype, lr, decay):
    """A sign step is exact, so the new weights are those of float64 rounded once, to the last bit but at ties."""
    start = (torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) * 4 - 2).to(dtype)
    weight, optimizer = one_matrix(lw.Scion, start, lr=lr, weight_decay=decay, momentum=0.0, radius={"hidden": 1.0})
    weight.grad = torch.where(start > 0, -1.0, 1.0).to(dtype)
    optimizer.step()
    exact = start.double() * (1 - 0.0078125 * decay) - 0.0078125 * weight.grad.sign().double()
    off = (weight.detach().double() - exact).abs()
    spacing = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    # half a spacing, and what float32 leaves of it
    assert (off <= spacing * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_decay_below_the_spacing_is_felt_with_stochastic_rounding(preset):
    """300 steps of decay alone, 1 - 2e-4 each: bfloat16's spacing is 2^-7, so rounded to nearest nothing moves."""
    model = net(torch.bfloat16)
    model.up.weight.data = torch.rand(10, 6).add(1).bfloat16()
    names = ("up.weight", "down.weight", "embed.weight", "head.weight")
    before = {n: model.get_parameter(n).double().norm() for n in names}
    optimizer = make(preset, model, lr=2e-3, weight_decay=0.1, rounding="stochastic")
    for group in optimizer.param_groups:
        group["lr"] = 2e-3
    for _ in range(300):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for name in names:
        shrunk = float(model.get_parameter(name).detach().double().norm() / before[name])
        # the mean is exact; one entry walks by at most a spacing, with a variance of at most its square / 4 a step
        assert shrunk == pytest.approx((1 - 2e-4) ** 300, abs=0.02), name


@pytest.mark.parametrize("preset", PRESETS)
def test_stochastic_rounding_resumes_bit_for_bit(preset):
    def step(optimizer, model, seeds):
        for seed in seeds:
            set_gradients(model, seed)
            optimizer.step()

    model = net(torch.bfloat16)
    optimizer = make(preset, model, rounding="stochastic", weight_decay=0.1)
    step(optimizer, model, range(3))
    saved, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    again = make(preset, other, rounding="stochastic", weight_decay=0.1)
    again.load_state_dict(saved)
    step(optimizer, model, (7, 8))
    step(again, other, (7, 8))
    assert_same_bits(tensors(model, optimizer), tensors(other, again))
    seeds = [group["rounding_seed"] for group in optimizer.param_groups]
    assert seeds == [5] * len(seeds)


@settings(max_examples=60)
@given(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), st.integers(0, 2**40))
def test_what_bfloat16_holds_is_left_alone_and_the_rest_goes_to_a_neighbour(value, seed):
    wide = torch.full((64,), value)
    rounded = stochastically(wide, seed)
    assert torch.equal(rounded, rounded.bfloat16().float())
    nearest = wide.bfloat16().float()
    if torch.equal(nearest, wide):
        assert torch.equal(rounded, wide)
    assert (rounded - wide).abs().max() <= wide[0].abs() * 2**-7 + 2**-133  # a spacing, that of denormals too


def test_stochastic_rounding_has_no_bias():
    """Of 2^20 draws the mean is within five deviations, of at most half a spacing each, of the number."""
    for value in (1.001, -1.3e-3, 3.14159):
        wide = torch.full((2**20,), value)
        spacing = 2.0**-7 * 2.0 ** float(torch.tensor(abs(value)).log2().floor())
        mean = float(stochastically(wide, 3).double().mean())
        assert abs(mean - float(wide[0])) < 5 * spacing / 2 / 2**10


def test_infinities_and_nan_stay_what_they_are():
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    torch.testing.assert_close(stochastically(odd, 0), odd, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_wider_weights_it_changes_no_bit(dtype):
    models = [net(dtype) for _ in range(2)]
    optimizers = [make("lanton", models[0]), make("lanton", models[1], rounding="stochastic")]
    for seed in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            set_gradients(model, seed)
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def steps_of(preset, start, count, gradient=1.0, **options):
    weight, optimizer = one_matrix(preset, start, **options)
    for _ in range(count):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    return weight, optimizer


def test_steps_below_the_spacing_are_said_once_and_not_where_they_move():
    start = (torch.rand(16, 16) + 1).bfloat16()
    options = {"lr": 1e-3, "weight_decay": 0.0}
    with pytest.warns(UserWarning, match=r"100 % of the weights in half precision.*rounding='stochastic'") as told:
        weight, _ = steps_of(lw.Scion, start, 120, **options, radius={"hidden": 1.0})
    assert len(told) == 1
    assert torch.equal(weight, start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight, _ = steps_of(lw.Scion, start, 120, **options, radius={"hidden": 1.0}, rounding="stochastic")
        moved = float((start - weight.detach()).double().mean())
        steps_of(lw.Scion, start * 1e-3, 120, **options, radius={"hidden": 1.0})
        steps_of(lw.Scion, start.float(), 120, **options, radius={"hidden": 1.0})
    # 120 steps of 1e-3; 256 entries, each off by at most half a spacing a step
    assert moved == pytest.approx(0.12, abs=5 * 2**-8 * (120 / 256) ** 0.5)


def test_decay_below_the_spacing_is_said():
    start = (torch.rand(16, 16) + 1).bfloat16()
    with pytest.warns(UserWarning, match="lr \\* weight_decay, is below their spacing"):
        steps_of(lw.Scion, start, 10, gradient=0.0, lr=2e-3, weight_decay=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rounding": "up"}, "give one of 'nearest', 'stochastic'"), ({"rounding_seed": -1}, "whole number")],
)
def test_options_are_checked(options, message):
    with pytest.raises(lw.LayerwiseError, match=message):
        lw.Lanton(lw.param_groups(nn.Linear(2, 2), overrides={"*": options}))
