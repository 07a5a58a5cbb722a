"""What schedulers move besides a number `lr`: one tensor for all groups, and the momentum."""

import copy

import pytest
import torch
from tiny import assert_same_bits, make, net, set_gradients, tensors, twin
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import layerwise as lw

PRESETS = ["muon", "d-muon", "dual-muon", "scion", "signum", "lanton", "lanton-momentum"]
CYCLES = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.001, max_lr=0.02, step_size_up=3),
}
SCHEDULERS = CYCLES | {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "multi step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "swa": lambda o: SWALR(o, swa_lr=0.001, anneal_epochs=5),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], [5]
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_no_scheduler_of_torch_is_left_out():
    tried = {type(make_scheduler(make("muon", net()))).__name__ for make_scheduler in SCHEDULERS.values()}
    theirs = {
        name
        for name in lr_scheduler.__all__
        if isinstance(kind := getattr(lr_scheduler, name), type)
        and (issubclass(kind, lr_scheduler.LRScheduler) or hasattr(kind, "step"))
    }
    assert tried == (theirs - {"LRScheduler"}) | {"SWALR"}


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR gives it, deprecated
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_resumes_in_the_middle(preset, name):
    def steps(model, optimizer, scheduler, numbers):
        for step in numbers:
            set_gradients(model, step)
            optimizer.step()
            scheduler.step(*([1.0] if name == "plateau" else []))

    model = net()
    optimizer = make(preset, model)
    scheduler = SCHEDULERS[name](optimizer)
    steps(model, optimizer, scheduler, range(4))
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    steps(model, optimizer, scheduler, range(4, 8))
    other = net(seed=9)
    again = make(preset, other)
    rescheduled = SCHEDULERS[name](again)
    for part, state in zip((other, again, rescheduled), states, strict=True):
        part.load_state_dict(state)
    steps(other, again, rescheduled, range(4, 8))
    assert_same_bits(tensors(model, optimizer), tensors(other, again))
    for mine, theirs in zip(again.param_groups, optimizer.param_groups, strict=True):
        assert (mine["lr"], mine["momentum"], mine["betas"]) == (
            theirs["lr"],
            theirs["momentum"],
            theirs["betas"],
        )


@pytest.mark.skipif(torch.__version__ < "2.13", reason="ReduceLROnPlateau of torch 2.9 makes numbers of tensors")
@pytest.mark.parametrize("preset", PRESETS)
def test_one_tensor_as_the_rate_of_all_groups_is_lowered_once(preset):
    rates = []
    for lr in (1e-2, torch.tensor(1e-2)):
        optimizer = make(preset, net(), lr=lr)
        make(preset, net(), lr=lr).param_groups[0]["lr"] *= 0.1  # that of another optimizer
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
