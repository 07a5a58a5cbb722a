"""A momentum that warms up: its window grows evenly, one count a group, and what does not ask for it is as it was."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_same_bits, net, set_gradients, tensors
from torch import nn

import layerwise as lw
from layerwise.optim.work.job import current_momentum


def window(momentum):
    """Gradients that an average holds."""
    return 1 / (1 - momentum)


@given(st.floats(0, 0.999), st.integers(1, 1000), st.integers(0, 2000))
def test_the_window_grows_evenly_from_one_gradient_to_its_full_length(momentum, warmup, taken):
    group = {"momentum": momentum, "momentum_warmup": warmup, "momentum_steps": taken}
    part = min(1.0, (taken + 1) / warmup)
    # The window of a momentum is as badly conditioned as the window is long: 1,000 roundings at most.
    assert window(current_momentum(group)) == pytest.approx(1 + part * (window(momentum) - 1), rel=2e-12)
    if taken + 1 >= warmup:
        assert current_momentum(group) == momentum


def test_the_average_holds_the_gradients_that_the_momenta_say():
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    group = {"params": [("w", weight)], "layout": lw.param_groups(nn.Linear(2, 3))[0]["layout"], "geometry": lw.Sign()}
    optimizer = lw.LayerwiseOptimizer([group], lr=0.1, momentum=0.9, momentum_warmup=6)
    generator = torch.Generator().manual_seed(0)
    average = torch.zeros(3, 2, dtype=torch.float64)
    for step in range(9):
        weight.grad = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        part = min(1.0, (step + 1) / 6)
        momentum = 1 - 1 / (1 + part * 9)
        average = momentum * average + (1 - momentum) * weight.grad
        optimizer.step()
        torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], average, rtol=1e-14, atol=1e-15)


def test_a_look_ahead_is_by_the_momentum_of_its_step():
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    group = {"params": [("w", weight)], "layout": lw.param_groups(nn.Linear(2, 3))[0]["layout"]}
    optimizer = lw.LayerwiseOptimizer(
        [{**group, "geometry": lw.Frobenius()}], lr=1.0, momentum=0.5, momentum_warmup=2, nesterov=True
    )
    weight.grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer.step()  # one gradient: every mean of it points its way
    first, second = weight.grad, torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before, weight.grad = weight.detach().clone(), second
    optimizer.step()
    average = first / 1.5  # a window of 1.5 in the first step
    average = 0.5 * average + 0.5 * second
    ahead = 0.5 * average + 0.5 * second
    torch.testing.assert_close(before - weight.detach(), ahead / ahead.norm(), rtol=1e-13, atol=1e-15)


def test_without_a_warm_up_nothing_is_counted_and_the_steps_are_as_always():
    model, other = net(), net()
    plain = lw.DualMuon(lw.param_groups(model), lr=0.01, momentum_warmup=0)
    done = lw.DualMuon(lw.param_groups(other), lr=0.01, momentum_warmup=1)  # over before its first step
    for step in range(3):
        for some, optimizer in ((model, plain), (other, done)):
            set_gradients(some, step)
            optimizer.step()
    assert not any("momentum_steps" in group for group in plain.param_groups)
    assert_same_bits(tensors(model, plain), tensors(other, done))


def test_only_groups_that_take_unit_steps_count():
    model = net()
    optimizer = lw.DualMuon(lw.param_groups(model), lr=0.01)
    set_gradients(model, 0)
    optimizer.step()
    counts = {group["role"]: group.get("momentum_steps") for group in optimizer.param_groups}
    assert counts["hidden"] == 1
    assert counts["head"] is None


def test_a_step_that_is_skipped_does_not_count():
    model = net()
    optimizer = lw.DualMuon(lw.param_groups(model), lr=0.01, nonfinite="skip")
    set_gradients(model, 0)
    next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert {group["momentum_steps"] for group in optimizer.param_groups if "momentum_steps" in group} == {0}


def test_a_run_resumed_in_the_warm_up_is_the_run():
    model = net()
    optimizer = lw.DualMuon(lw.param_groups(model), lr=0.01, momentum_warmup=5)
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
    other = copy.deepcopy(model)
    resumed = lw.DualMuon(lw.param_groups(other), lr=0.01, momentum_warmup=5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 7):
        for some, each in ((model, optimizer), (other, resumed)):
            set_gradients(some, step)
            each.step()
    assert_same_bits(tensors(model, optimizer), tensors(other, resumed))


def test_a_group_that_comes_later_warms_up_by_itself():
    early, late = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    hidden = {"layout": lw.param_groups(nn.Linear(4, 4))[0]["layout"], "geometry": lw.Spectral(), "role": "hidden"}
    optimizer = lw.DualMuon([{"params": [("early", early.weight)], **hidden}], lr=0.01, momentum_warmup=4)
    for step in range(6):
        if step == 2:
            optimizer.add_param_group({"params": [("late", late.weight)], **hidden})
        for layer in (early, late):
            layer.weight.grad = torch.ones(4, 4)
        optimizer.step()
    a, b = (optimizer.state[layer.weight]["momentum_buffer"] for layer in (early, late))
    # The share of a run of ones that an average from zero holds: one less the product of its momenta.
    first, second = ([1 - 1 / (1 + min(1.0, (k + 1) / 4) * 19) for k in range(steps)] for steps in (6, 4))
    torch.testing.assert_close(a, torch.full((4, 4), 1 - math.prod(first)), rtol=1e-6, atol=0)
    torch.testing.assert_close(b, torch.full((4, 4), 1 - math.prod(second)), rtol=1e-6, atol=0)


def test_a_step_whose_groups_are_split_counts_once():
    model, batch = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), torch.ones(3, 4)
    optimizer = lw.DualMuon(lw.param_groups(model, batch), lr=0.01)
    flerm = lw.FLeRM(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        with flerm.step(batch):
            optimizer.step()
    hidden = [group["momentum_steps"] for group in optimizer.param_groups if group["role"] == "hidden"]
    assert hidden == [3]
    assert len({round(change, 6) for change in flerm.named.multipliers.values()}) > 1  # they were split


@pytest.mark.parametrize("value", [-1, 1.5, True, "200"])
def test_a_warm_up_that_is_no_number_of_steps_is_refused(value):
    with pytest.raises(lw.LayerwiseError, match=r"momentum_warmup=.*whole number"):
        lw.DualMuon(lw.param_groups(net()), momentum_warmup=value)


def test_a_reference_that_would_misread_the_average_is_refused():
    with pytest.raises(lw.LayerwiseError, match=r"momentum_warmup=200.*momentum_warmup=0"):
        lw.DualMuon(lw.param_groups(net()), rates=lw.NoiseAdaptive(reference="momentum"))
