"""What schedulers move besides a number `lr`: one tensor for all groups, and the momentum."""

import copy

import pytest
import torch
from tiny import assert_same_bits, make, net, set_gradients, tensors, twin
from torch.optim import lr_scheduler

import layerwise as lw

PRESETS = ["muon", "d-muon", "scion", "signum", "lanton", "lanton-momentum"]
CYCLES = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.001, max_lr=0.02, step_size_up=3),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_one_tensor_as_the_rate_of_all_groups_is_lowered_once(preset):
    rates = []
    for lr in (1e-2, torch.tensor(1e-2)):
        optimizer = make(preset, net(), lr=lr)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        scheduler.step(1.0)
        scheduler.step(1.0)
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        matrices = [group["lr"] for group in optimizer.param_groups if group["role"] == "hidden"]
        assert all(isinstance(rate, type(lr)) for rate in matrices)
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cycle", CYCLES)
def test_a_scheduler_that_cycles_momentum_moves_that_of_the_matrices(preset, cycle):
    """As an optimizer whose momentum and rate are set by hand before each step; and resumed in the middle."""
    model = net()
    by_hand = twin(model)
    optimizer, other = make(preset, model), make(preset, by_hand)
    scheduler = CYCLES[cycle](optimizer)
    seen = set()
    for step in range(8):
        for group, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
            theirs["lr"], theirs["betas"] = group["lr"], group["betas"]
            if repr(group["update"]) == "lmo":
                theirs["momentum"] = group["betas"][0]
                seen.add(round(group["betas"][0], 6))
        for m, o in ((model, optimizer), (by_hand, other)):
            set_gradients(m, step)
            o.step()
        scheduler.step()
        if step == 3:
            states = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
            model = net(seed=9)
            optimizer = make(preset, model)
            scheduler = CYCLES[cycle](optimizer)
            for part, state in zip((model, optimizer, scheduler), states, strict=True):
                part.load_state_dict(state)
    assert_same_bits(tensors(model, optimizer), tensors(by_hand, other))
    assert len(seen) > 3


@pytest.mark.parametrize("preset", [lw.Muon, lw.DMuon])
def test_float16_weights_keep_adamws_moments_in_float32(preset):
    """In float16 its eps and the squares of small gradients are 0, and 0 / 0 was NaN."""
    half, full = net(torch.float16), net()
    optimizers = [preset(lw.param_groups(model)) for model in (half, full)]
    for step in range(5):
        for model, optimizer in zip((half, full), optimizers, strict=True):
            set_gradients(model, step, scale=1e-5)
            optimizer.step()
    for (name, a), b in zip(half.named_parameters(), full.parameters(), strict=True):
        assert a.isfinite().all(), name
        # Both take five steps of at most 0.02 per entry; weights of order one are rounded to 2^-11 at each.
        assert (a.float() - b).abs().max() < 0.01, name
    for group in optimizers[0].param_groups:
        if repr(group["update"]) == "adamw":
            for param in group["params"]:
                assert optimizers[0].state[param]["exp_avg_sq"].dtype == torch.float32
