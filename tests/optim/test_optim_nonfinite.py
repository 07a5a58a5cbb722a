"""NaN and inf in gradients: told by name or skipped and counted; on the host and, as a GPU does it, on the device."""

import math

import pytest
import torch
from tiny import OPTIMIZERS, assert_same_bits, make, net, set_gradients, take_step, tensors

import layerwise as lw
from layerwise.errors import NonFiniteError

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
HALVES = ("half_difference",)  # written by hold_half, before the step


def poison(model, value, names=("norm.weight", "down.weight")):
    for name in names:
        model.get_parameter(name).grad.view(-1)[-1] = value


@every_optimizer
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_raise_names_the_parameters_and_changes_nothing(name, value):
    model = net()
    optimizer = make(name, model)
    for step in range(2):
        take_step(optimizer, model, step)
    set_gradients(model, 2)
    optimizer.hold_half()
    poison(model, value)
    before = tensors(model, optimizer)
    with pytest.raises(
        lw.LayerwiseError, match=r"'(norm|down).weight', '(norm|down).weight'; the weights were not touched"
    ) as error:
        optimizer.step()
    assert "nonfinite='skip'" in str(error.value)
    assert_same_bits(before, tensors(model, optimizer), but=HALVES)
    optimizer.zero_grad()
    take_step(optimizer, model, 3)


@every_optimizer
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.001, "1e-3"])
def test_a_rate_that_a_schedule_set_to_no_number_never_reaches_the_weights(name, value):
    model = net()
    optimizer = make(name, model)
    take_step(optimizer, model, 0)
    before = tensors(model, optimizer)
    optimizer.param_groups[-1]["lr"], lr = value, optimizer.param_groups[-1]["lr"]
    with pytest.raises(lw.LayerwiseError, match=rf"lr is {value!r} in the group of \w+\..*: give a finite number"):
        take_step(optimizer, model, 1)
    assert_same_bits(before, tensors(model, optimizer), but=HALVES)
    optimizer.param_groups[-1]["lr"] = lr
    take_step(optimizer, model, 1)


@every_optimizer
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skip_counts_and_leaves_no_trace(name, value):
    model, other = net(), net()
    optimizer, plain = make(name, model, nonfinite="skip"), make(name, other)
    for step in range(4):
        for m, o in ((model, optimizer), (other, plain)):
            take_step(o, m, step)
        set_gradients(model, 100 + step)
        optimizer.hold_half()
        poison(model, value)
        optimizer.step()
        assert optimizer.skipped_steps == step + 1
    assert_same_bits(tensors(other, plain), tensors(model, optimizer), but=HALVES)


def test_the_count_is_saved():
    model = net()
    optimizer = make("lanton", model, nonfinite="skip")
    set_gradients(model, 0)
    poison(model, math.nan)
    optimizer.step()
    again = make("lanton", net(), nonfinite="skip")
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped_steps == 1


def test_a_long_list_is_cut():
    model = net()
    optimizer = make("lanton", model)
    set_gradients(model, 0)
    poison(model, math.nan, [name for name, _ in model.named_parameters()])
    with pytest.raises(NonFiniteError, match="and 4 more"):
        optimizer.step()


def test_the_largest_finite_gradient_passes():
    """The 2-norm of such a gradient overflows; the check must not mistake it for inf."""
    model = net()
    optimizer = make("signum", model)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.finfo(torch.float32).max)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


# What the guard answers on a GPU: a tensor, by which every update is selected. Here it lives on the CPU.


def answer(optimizer, monkeypatch, keep):
    monkeypatch.setattr(optimizer.guard, "check", lambda *args: torch.tensor(keep))


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_step_forbidden_on_the_device_changes_no_bit(name, dtype, monkeypatch):
    model = net(dtype)
    optimizer = make(name, model, weight_decay=0.5)
    with torch.no_grad():
        model.up.weight[0, 0] = -0.0
    for seen in range(3):  # before any gradient, with one, and in the middle of training
        before = tensors(model, optimizer)
        answer(optimizer, monkeypatch, False)
        for value in (math.nan, math.inf):
            set_gradients(model, seen + 50)
            optimizer.hold_half()
            poison(model, value, [n for n, _ in model.named_parameters()])
            optimizer.step()
            assert_same_bits(before, tensors(model, optimizer), but=HALVES)
        monkeypatch.undo()
        take_step(optimizer, model, seen)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_step_allowed_on_the_device_equals_the_hosts(name, dtype, tensor_lr, monkeypatch):
    models = [net(dtype), net(dtype)]
    lr = (lambda: torch.tensor(2**-9)) if tensor_lr else (lambda: 2**-9)
    optimizers = [make(name, m, lr=lr(), weight_decay=0.5) for m in models]
    answer(optimizers[1], monkeypatch, True)
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            take_step(optimizer, model, step)
    host, device = (tensors(*pair) for pair in zip(models, optimizers, strict=True))
    by_adamw = {n for n in host if f"{n}.exp_avg" in host or ".exp_avg" in n}
    assert_same_bits(
        {n: v for n, v in host.items() if n not in by_adamw},
        {n: v for n, v in device.items() if n not in by_adamw},
    )
    for n in by_adamw:  # the fused kernel and the loop round differently, in the last digits of a step of at most lr
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(host[n], device[n], rtol=4 * eps, atol=4 * 2**-9 * max(eps, 1e-6) * 4)


def test_a_device_is_asked_without_waiting_and_told_later(monkeypatch):
    """The background copy's bookkeeping, with events that arrive when the test says so."""
    model = net()
    optimizer = make("lanton", model)
    arrived = []

    class Event:
        def record(self):
            arrived.append(False)
            self.index = len(arrived) - 1

        def query(self):
            return arrived[self.index]

    original = torch.empty_like
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty_like", lambda t, device, pin_memory: original(t, device="cpu"))
    guard = optimizer.guard
    bad, good = torch.tensor([math.nan]), torch.tensor([1.0])
    monkeypatch.setattr("layerwise.optim.guard.WITH_EVENTS", ("cpu",))
    assert guard.check(["a"], [good]).item() is True
    assert guard.check(["b"], [bad]).item() is False
    arrived[0] = True
    assert guard.check(["c"], [good]).item() is True  # b's finding is still on its way
    arrived[1] = True
    with pytest.raises(lw.LayerwiseError, match="'b'"):
        guard.check(["d"], [good])
    assert guard.check(["e"], [good]).item() is True


@pytest.mark.parametrize("name", ["lanton", "lanton-momentum", "namo"])
def test_finite_gradients_whose_squares_or_differences_are_not(name):
    """1e38 and -1e38 are finite; their squares, and their difference's norm, are not: rates must outlive them."""
    model = net()
    optimizer = make(name, model)
    for scale in (1.0, 1e37, -1e37, 1.0, 1.0):
        set_gradients(model, 0, scale=scale)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(math.isfinite(rate.multiplier) for rate in optimizer.layer_rates().values())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_differences_that_leave_float16(alpha):
    model = net(torch.float16)
    optimizer = lw.Lanton(lw.param_groups(model), lr=1e-3, rates=lw.NoiseAdaptive(alpha=alpha))
    for sign in (1, -1, 1):
        for p in model.parameters():
            p.grad = torch.full_like(p, sign * 4e4)
        optimizer.step()
    rates = optimizer.layer_rates()
    # All entries of the last difference are 8e4, and the nuclear norm of a rank-one matrix is its Frobenius norm. The dual
    # of the RMS to RMS norm of a 10 x 6 matrix is sqrt(10 / 6) of it.
    assert rates["up.weight"].squared_norm == pytest.approx((8e4) ** 2 * 60 * 10 / 6, rel=0.01)
    assert all(math.isfinite(rate.multiplier) for rate in rates.values())
    assert all(p.isfinite().all() for p in model.parameters())
