"""Schedulers, GradScaler and accelerate move and drive every group as they do torch's own optimizers."""

import warnings

import pytest
import torch
from tiny import assert_same_bits, loss_of, make, net, set_gradients, tensors
from torch.optim import lr_scheduler

import layerwise as lw

STEPS = 8


def cosine_with_warmup(optimizer):
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, 3, STEPS)


SCHEDULES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "transformers": cosine_with_warmup,
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_group_follows_the_schedule(schedule, tensor_lr):
    """Group by group as torch's AdamW with the same rates: Muon's groups have two."""
    if tensor_lr and schedule == "sequential" and torch.__version__ < "2.13":
        pytest.skip("SequentialLR of torch 2.9 begins with another tensor rate than with a number")
    model, other = net(), net()
    lrs = [torch.tensor(0.02), torch.tensor(3e-4)] if tensor_lr else [0.02, 3e-4]
    optimizer = lw.Muon(lw.param_groups(model), lr=lrs[0], adamw_lr=lrs[1])
    first = [float(group["lr"]) for group in optimizer.param_groups]
    assert len(set(first)) == 2
    named = dict(other.named_parameters())
    theirs = torch.optim.AdamW(
        [{"params": [named[n] for n in group["param_names"]], "lr": lr} for group, lr in
         zip(optimizer.param_groups, first, strict=True)]
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls step with an epoch, which torch deprecates
        schedulers = [SCHEDULES[schedule](o) for o in (optimizer, theirs)]
        for step in range(STEPS):
            for m, o, scheduler in zip((model, other), (optimizer, theirs), schedulers, strict=True):
                set_gradients(m, step)
                o.step()
                scheduler.step()
            mine = [float(group["lr"]) for group in optimizer.param_groups]
            assert mine == pytest.approx([group["lr"] for group in theirs.param_groups], rel=1e-5)
            rates = optimizer.layer_rates()
            for group, lr in zip(optimizer.param_groups, mine, strict=True):
                assert {rates[n].lr for n in group["param_names"]} == {lr}
    state = optimizer.state_dict()
    again = lw.Muon(lw.param_groups(net()))
    again.load_state_dict(state)
    assert [group["lr"] for group in again.param_groups] == mine


def test_a_schedule_resumes_on_a_loaded_optimizer():
    model = net()
    optimizer = make("lanton", model, lr=0.1)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    saved = optimizer.state_dict(), scheduler.state_dict()
    again = make("lanton", net(), lr=0.1)
    resumed = lr_scheduler.CosineAnnealingLR(again, STEPS)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(3):
        for o, s in ((optimizer, scheduler), (again, resumed)):
            o.step()
            s.step()
        assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("name", ["lanton", "muon"])
def test_grad_scaler(name):
    """A loss scaled by a power of two and unscaled again is the plain step; an overflow skips the whole step."""
    model, other = net(), net()
    optimizer, plain = make(name, model), make(name, other)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        overflows = step == 3
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if overflows:
            model.up.weight.grad[0, 0] = torch.inf
        before = tensors(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert_same_bits(before, tensors(model, optimizer))
            assert scaler.get_scale() == 2.0**9
            continue
        plain.zero_grad()
        loss_of(other, step).backward()
        plain.step()
    assert_same_bits(tensors(other, plain), tensors(model, optimizer))
    assert optimizer.skipped_steps == 0


def test_gradient_clipping_comes_before_the_step():
    model = net()
    optimizer = make("lanton", model)
    for step in range(3):
        set_gradients(model, step, scale=100.0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # the dual norm of what is left of gradients of norm one, for a vector: sqrt(d) ||g||, twice, squared
    assert optimizer.layer_rates()["norm.weight"].squared_norm <= 10 * (1 + 1) ** 2


@pytest.mark.parametrize("name", ["lanton", "muon", "lanton-independent"])
def test_accelerate_drives_it(name):
    from accelerate import Accelerator

    model, other = net(), net()
    optimizer, plain = make(name, model), make(name, other)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, prepared, scheduler = accelerator.prepare(
        model, optimizer, lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    )
    by_hand = lr_scheduler.LambdaLR(plain, lambda t: 1 / (1 + t))
    for step in range(6):
        with accelerator.accumulate(wrapped):
            accelerator.backward(loss_of(wrapped, step))
            if step % 2 == 0:
                optimizer.hold_half()
            prepared.step()
            scheduler.step()
            prepared.zero_grad()
        loss_of(other, step).div(2).backward()
        if step % 2 == 0:
            plain.hold_half()
        else:
            plain.step()
            by_hand.step()
            plain.zero_grad()
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert_same_bits(tensors(other, plain), tensors(model, optimizer))
    state = prepared.state_dict()
    prepared.load_state_dict(state)
