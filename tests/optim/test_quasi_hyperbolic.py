"""Quasi-hyperbolic AdamW (`nu`): the formula, torch's AdamW at its ends, precisions, checkpoints."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import net
from torch import nn

import layerwise as lw
from layerwise.errors import LayerwiseError


def groups(params, **options):
    layout = lw.param_groups(nn.Linear(2, 3))[0]["layout"]
    return [{"params": params, "layout": layout, "geometry": lw.Spectral(), "update": "adamw", **options}]


def optimizer_of(*params, nu=0.7, **options):
    named = [(f"w{i}", param) for i, param in enumerate(params)]
    return lw.LayerwiseOptimizer(groups(named, nu=nu), **options)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30)
@given(st.floats(0.0, 0.99), st.floats(0.01, 0.99), st.floats(0.0, 0.999), st.floats(0.0, 0.5))
def test_a_step_goes_along_a_mixture_of_average_and_gradient(nu, beta1, beta2, decay):
    params = [nn.Parameter(random(3, 2)), nn.Parameter(random(5, seed=1))]
    twins = [param.detach().clone() for param in params]
    optimizer = optimizer_of(*params, nu=nu, lr=0.1, betas=(beta1, beta2), weight_decay=decay, eps=1e-3)
    averages, squares, taken = [[torch.zeros_like(twin) for twin in twins] for _ in range(2)] + [[0, 0]]
    for step in range(4):
        for i, param in enumerate(params):
            if i == 1 and step == 2:  # the corrections are each parameter's own
                param.grad = None
                continue
            param.grad = grad = random(*param.shape, seed=10 * step + i)
            taken[i] += 1
            averages[i] = beta1 * averages[i] + (1 - beta1) * grad
            squares[i] = beta2 * squares[i] + (1 - beta2) * grad**2
            mixed = nu * averages[i] / (1 - beta1 ** taken[i]) + (1 - nu) * grad
            size = (squares[i] / (1 - beta2 ** taken[i])).sqrt() + 1e-3
            twins[i] = (1 - 0.1 * decay) * twins[i] - 0.1 * mixed / size
        optimizer.step()
        for param, twin, average in zip(params, twins, averages, strict=True):
            # 1 - beta^t loses two digits where beta is 0.99, three where it is 0.999.
            torch.testing.assert_close(param.detach(), twin, rtol=0, atol=1e-12)
            torch.testing.assert_close(optimizer.state[param]["exp_avg"], average, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"nu": 1.0}, {"nu": 0.3, "betas": (0.0, 0.95)}])
def test_with_the_average_alone_and_without_an_average_a_step_is_torchs_adamw(options):
    param, other = nn.Parameter(random(4, 3)), nn.Parameter(random(4, 3))
    ours = optimizer_of(param, lr=0.1, weight_decay=0.1, **{"betas": (0.9, 0.95), **options})
    theirs = torch.optim.AdamW([other], lr=0.1, weight_decay=0.1, betas=options.get("betas", (0.9, 0.95)))
    for step in range(3):
        param.grad, other.grad = random(4, 3, seed=step), random(4, 3, seed=step)
        ours.step()
        theirs.step()
    torch.testing.assert_close(param, other, rtol=1e-14, atol=1e-15)


def test_with_beta_1_it_is_torchs_nadam_once_both_averages_have_filled():
    param, other = nn.Parameter(random(4, 3)), nn.Parameter(random(4, 3))
    ours = optimizer_of(param, nu=0.5, lr=0.1, betas=(0.5, 0.95), weight_decay=0.1)
    theirs = torch.optim.NAdam(
        [other], lr=0.1, betas=(0.5, 0.95), weight_decay=0.1, decoupled_weight_decay=True, momentum_decay=1e6
    )  # by so much its momentum is at 0.5 from the first step on
    for step in range(60):
        if step == 55:  # NAdam corrects by 1 - beta^t and 1 - beta^(t + 1): the same, but for 0.5^55
            other.data.copy_(param.data)
        param.grad, other.grad = random(4, 3, seed=step), random(4, 3, seed=step)
        ours.step()
        theirs.step()
    # torch keeps the product of momenta in float32
    torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keep", [True, False])
def test_on_a_device_it_is_taken_or_left_as_a_whole(keep, monkeypatch):
    param = nn.Parameter(random(4, 3))
    optimizer = optimizer_of(param, lr=0.1, nonfinite="skip")
    for step in range(2):
        param.grad = random(4, 3, seed=step)
        optimizer.step()
    told, other = copy.deepcopy(param), copy.deepcopy(optimizer.state_dict())
    twin = optimizer_of(told, lr=0.1, nonfinite="skip")
    twin.load_state_dict(other)
    monkeypatch.setattr(twin.guard, "check", lambda *args: torch.tensor(keep))
    param.grad, told.grad = random(4, 3, seed=5), random(4, 3, seed=5) if keep else torch.full((4, 3), torch.nan).double()
    before, average = told.detach().clone(), twin.state[told]["exp_avg"].clone()
    if keep:
        optimizer.step()
    twin.step()
    # there the corrections are float32's: 1 - 0.95^3 has six times its error
    torch.testing.assert_close(told.detach(), param.detach(), rtol=0, atol=1e-7) if keep else None
    assert keep or torch.equal(told.detach(), before)
    assert torch.equal(twin.state[told]["exp_avg"], optimizer.state[param]["exp_avg"] if keep else average)
    assert twin.state[told]["step"] == 2 + keep


def test_on_a_device_a_parameter_that_joins_late_has_corrections_of_its_own(monkeypatch):
    params = [nn.Parameter(random(4, 3)), nn.Parameter(random(5, seed=1)), nn.Parameter(random(5, seed=2))]
    twins = copy.deepcopy(params)
    here, there = optimizer_of(*params, lr=0.1), optimizer_of(*twins, lr=0.1)
    monkeypatch.setattr(there.guard, "check", lambda *args: torch.tensor(True))
    for step in range(4):
        for some in (params, twins):
            for i, param in enumerate(some):
                param.grad = random(*param.shape, seed=3 * step + i) if step > 1 or i != 1 else None
        here.step()
        there.step()
    for param, twin in zip(params, twins, strict=True):
        # float32's corrections: 1 - 0.95 has twenty times its error, of steps of 0.1; with another's it is off by 0.01
        torch.testing.assert_close(twin, param, rtol=0, atol=4e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_step_is_rounded_once(dtype):
    half = nn.Parameter(random(64).to(dtype))
    optimizer, eps = optimizer_of(half, lr=0.125, eps=1e-6), torch.finfo(dtype).eps
    for step in range(3):
        half.grad = random(64, seed=step).to(dtype)
        state = {key: value.float() for key, value in optimizer.state[half].items()}
        wide = nn.Parameter(half.detach().float())
        twin = optimizer_of(wide, lr=0.125, eps=1e-6)
        for key, value in state.items():
            twin.state[wide][key].copy_(value)
        wide.grad = half.grad.float()
        optimizer.step()
        twin.step()
        # torch's kernels differ in float32's last digits, which may tip a rounding: a whole spacing, not a half
        assert ((half.detach().float() - wide.detach()).abs() <= eps * wide.detach().abs() + 1e-7).all()
        kept, made = optimizer.state[half]["exp_avg"].float(), twin.state[wide]["exp_avg"]
        assert ((kept - made).abs() <= eps * made.abs() + 1e-7).all()


def test_dual_muon_has_it_in_its_adamw_groups_unless_told():
    for nu in (0.7, 1.0):
        optimizer = lw.DualMuon(lw.param_groups(net()), adamw_nu=nu)
        assert {g.get("nu") for g in optimizer.param_groups if repr(g["update"]) == "adamw"} == {nu}
    assert not any("nu" in group for group in lw.DMuon(lw.param_groups(net())).param_groups)


@pytest.mark.parametrize("nu", [-0.1, 1.1, "much"])
def test_a_bad_weight_is_named(nu):
    with pytest.raises(LayerwiseError, match=f"adamw_nu={nu!r}"):
        lw.DualMuon(lw.param_groups(net()), adamw_nu=nu)


def test_a_look_ahead_of_matrices_has_to_be_the_same():
    saved = lw.DualMuon(lw.param_groups(net()), nesterov=False).state_dict()
    with pytest.raises(LayerwiseError, match="nesterov of"):
        lw.DualMuon(lw.param_groups(net())).load_state_dict(saved)
