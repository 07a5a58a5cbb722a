"""Watching a run: its numbers are those that a few lines by hand give, and it changes no bit of the run."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ResNet, backward, batch, weights
from test_recording_leaves_no_trace import data, everything, network, optimizer_for
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import layerwise as lw
from layerwise.common.alike_names import siblings_of
from layerwise.function_space.steps.by_module import module_of, spectral_norms
from layerwise.function_space.steps.named_rates import constant_decay
from layerwise.function_space.watching.watch_record import ModuleReading
from layerwise.integrations.logged import RateLog

# Sums of up to 1056 products in float64, added up in another order; differences of weights lose three digits more.
ROUNDING = 1e-9

OPTIMIZERS = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True),
    "Lion": lambda model: pytorch_optimizer.Lion(model.parameters(), 1e-3, weight_decay=0.1),
    "torch's Muon": lambda model: torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], 1e-2),
    "Lanton": lambda model: lw.Lanton(lw.param_groups(model), lr=1e-3, weight_decay=0.1),
}


def by_hand(old: dict, new: dict, gradient: dict, earlier: dict, names: list[str]) -> dict[str, float]:
    """What a module's reading should be, of flat float64 vectors."""

    def flat(tensors: dict) -> Tensor:
        return torch.cat([tensors[name].double().flatten() for name in names])

    w, d, g, e = flat(old), flat(new) - flat(old), flat(gradient), flat(earlier)
    return {
        "weight_rms": w.square().mean().sqrt().item(),
        "update_rms": d.square().mean().sqrt().item(),
        "ratio": (d.norm() / w.norm()).item(),
        "gradient_rms": g.square().mean().sqrt().item(),
        "noise_to_signal": ((g - e).norm() / (2 * g @ e).sqrt()).item(),
        "loss_change": (g @ d).item(),
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_are_those_by_hand(name):
    model = ResNet(32, 3, dtype=torch.float64)
    optimizer = OPTIMIZERS[name](model)
    watch = lw.watch(model, optimizer, every=4, function_space_every=0)
    watched = {id(p) for group in optimizer.param_groups for p in group["params"]}
    earlier: dict = {}
    for step in range(1, 9):
        optimizer.zero_grad()
        backward(model, 0 if step > 6 else step)  # at the end the same batch twice: the signal is there
        old = weights(model)
        gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        if step == 8:
            new = weights(model)
            expected: dict = {}
            for n, p in model.named_parameters():
                if id(p) in watched:
                    expected.setdefault(module_of(n), []).append(n)
            record = watch.records[-1]
            assert record.step == 8
            assert list(record.modules) == list(expected)
            for module, names in expected.items():
                found = record.modules[module].numbers()
                for key, value in by_hand(old, new, gradient, earlier, names).items():
                    assert found[key] == pytest.approx(value, rel=ROUNDING), (module, key)
            assert record.loss_change == pytest.approx(
                sum(reading.update.loss_change for reading in record.modules.values())
            )
        earlier = gradient
    assert [record.step for record in watch.records] == [1, 4, 8]
    assert watch.records[0].modules["blocks.0"].update.noise_to_signal is None  # there was no step before


@pytest.mark.parametrize("kind", [lw.Lanton, lw.DualMuon])  # rates by noise; by dual norm, the head at 3 lr
def test_effective_rates_are_what_the_optimizer_makes_of_the_groups(kind):
    model = ResNet(16, 3)
    optimizer = kind(lw.param_groups(model, batch(0)[0]), lr=1e-2)
    watch = lw.watch(model, optimizer, every=3, function_space_every=0)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    record, rates = watch.records[-1], optimizer.layer_rates()
    assert {unit: (rate.squared_norm, rate.multiplier, rate.lr) for unit, rate in record.units.items()} == {
        unit: (rate.squared_norm, rate.multiplier, pytest.approx(rate.lr)) for unit, rate in rates.items()
    }
    # A module's rate is the mean of its parameters', weighted by entries.
    weight, bias = rates["blocks.1.weight"].lr, rates["blocks.1.bias"].lr
    assert record.modules["blocks.1"].lr == pytest.approx((16 * weight + bias) / 17)


def test_rates_told_of_a_head_at_three_times_the_rate_are_those_of_its_steps():
    model = ResNet(16, 3)
    optimizer = lw.DualMuon(lw.param_groups(model, batch(0)[0]), lr=1e-2, weight_decay=0.1, adamw_nu=1.0)
    recorder, flerm = lw.FunctionSpaceRecorder(model, optimizer, probes=8), lw.FLeRM(model, optimizer, probes=8)
    backward(model, 0)
    old = model.out.weight.detach().clone()
    with recorder.step(batch(0)[2]), flerm.step(batch(0)[2]):
        optimizer.step()
    assert recorder.records[0].lrs["out.weight"] == pytest.approx(0.03)
    assert constant_decay(optimizer, flerm.parameters)["out.weight"] == pytest.approx(0.03 * 0.1)
    row = flerm.reports[0].rows["out.weight"]
    assert row.lr == flerm.learning_rates()["out.weight"] == pytest.approx(0.03 * row.change)
    # AdamW's first step is lr * sign(g), up to eps over the gradient; decay takes lr * 0.1 of the weight.
    moved = (model.out.weight - old * (1 - 0.1 * row.lr)).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, row.lr), rtol=1e-3, atol=0.0)


def test_rates_that_flerm_sets_are_seen_whoever_came_first():
    for flerm_first in (True, False):
        model = ResNet(16, 3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        made: list = [None, None]
        for which in ("flerm", "watch") if flerm_first else ("watch", "flerm"):
            if which == "flerm":
                made[0] = lw.FLeRM(model, optimizer, "uniform", probes=8)
            else:
                made[1] = lw.watch(model, optimizer, every=2, function_space_every=0)
        flerm, watch = made
        for step in range(2):
            optimizer.zero_grad()
            backward(model, step)
            old = weights(model)
            with flerm.step(batch(step)[2]):
                optimizer.step()
            if step == 0:  # the step as FLeRM redid it
                moved = (model.out.weight - old["out.weight"]).square().sum()
                moved += (model.out.bias - old["out.bias"]).square().sum()
                update = watch.records[0].modules["out"].update
                assert update.update_rms == pytest.approx((moved.item() / (5 * 17)) ** 0.5, rel=1e-4)
        weight, bias = (flerm.learning_rates()[f"blocks.1.{kind}"] for kind in ("weight", "bias"))
        assert watch.records[-1].modules["blocks.1"].lr == pytest.approx((16 * weight + bias) / 17)
        assert abs(weight / 0.1 - 1) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_watched_run_is_the_plain_one_bit_for_bit(dtype):
    def run(watched: bool) -> dict:
        model = network().to(dtype)
        optimizer = optimizer_for(model)
        if watched:
            watch = lw.watch(model, optimizer, every=1, function_space_every=1)
        torch.manual_seed(11)
        for step in range(4):
            x, y, _ = data(step, dtype)
            for _ in range(2):  # gradients are accumulated over two micro-batches, and zeroed in place later
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step < 3:
                optimizer.zero_grad(set_to_none=False)
        if watched:
            assert len(watch.records) == 4
            assert watch.records[-1].together is not None
        return everything(model, optimizer)

    plain, watched = run(False), run(True)
    for key, value in plain.items():
        assert torch.equal(value, watched[key]), key


def test_an_optimizer_that_writes_into_the_gradient_is_found_out():
    class Centring(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.sub_(p.grad.mean())
            return super().step(closure)

    model = ResNet(16, 3)
    optimizer = Centring(model.parameters(), 0.1)
    watch = lw.watch(model, optimizer, every=1, function_space_every=0)
    for step in range(2):
        optimizer.zero_grad()
        backward(model, step)
        squares = sum(p.grad.square().sum() for p in model.blocks[0].parameters())
        optimizer.step()
    assert watch.records[0].modules["blocks.0"].update.gradient_rms is None
    found = watch.records[1].modules["blocks.0"].update.gradient_rms
    assert found == pytest.approx(math.sqrt(squares / (16 * 17)), rel=1e-5)


def test_a_closure_is_watched_like_a_plain_step():
    records = []
    for closed in (False, True):
        model = ResNet(16, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        watch = lw.watch(model, optimizer, every=2, function_space_every=0)
        for step in range(4):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                return backward(model, step)

            if closed:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        records.append(list(watch.records))
    assert records[0] == records[1]
    assert records[0][-1].modules["out"].update.noise_to_signal is not None


# ---------------------------------------------------------------------------------------------------- spectral norms


@settings(max_examples=40)
@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from(["normal", "low rank", "sign"]),
    st.integers(0, 100), st.sampled_from([1e-12, 1.0, 1e12]),
)  # fmt: skip
def test_spectral_norms_come_from_below_and_are_close(rows, columns, kind, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    if kind == "low rank":
        matrix = matrix[:, :, :1] @ matrix[:, :1, :] + 0.1 * matrix
    if kind == "sign":
        matrix = matrix.sign()
    matrix *= scale
    true = torch.linalg.svdvals(matrix)[:, 0]
    estimate = spectral_norms([matrix])[0]
    assert (estimate <= true * (1 + 1e-12)).all()
    assert (estimate >= 0.75 * true).all()  # six products; the worst of 12,000 draws of these kinds was 0.81
    assert torch.allclose(spectral_norms([matrix], 60)[0], true, rtol=1e-9)


def test_spectral_norms_of_nothing_and_of_infinity():
    stack = torch.stack([torch.zeros(3, 4), torch.full((3, 4), math.inf)])
    zero, infinite = spectral_norms([stack])[0].tolist()
    assert zero == 0
    assert not math.isfinite(infinite)


# -------------------------------------------------------------------------------------------------- in function space


def test_function_space_is_measured_on_the_inputs_of_the_step_before():
    model = ResNet(16, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = lw.watch(model, optimizer, every=3, method="exact")
    watch.function_space_every = 6
    for step in range(1, 7):
        optimizer.zero_grad()
        backward(model, step)
        before, old = copy.deepcopy(model), weights(model)
        optimizer.step()
        assert not model._forward_pre_hooks or step == 4  # for the forward of step 5
    assert [record.step for record in watch.records if record.together is not None] == [6]
    update = {name: new - old[name] for name, new in weights(model).items()}
    inputs = batch(5)[0][:8]  # a quarter of 32
    expected = lw.function_space_rates(before, update, inputs, method="exact")
    record = watch.records[-1]
    for module, reading in record.modules.items():
        values = [rate.value for name, rate in expected.items() if module_of(name) == module]
        # The updates are differences of float32 weights: 1e-3 of 0.2, to 1e-8.
        assert reading.rate == pytest.approx(sum(values), rel=1e-3)
        assert reading.share == pytest.approx(sum(values) / expected.total, rel=1e-3)
    moved = (model(inputs) - before(inputs)).square().mean().sqrt().item()
    assert record.together.moved == pytest.approx(moved, rel=1e-3)
    assert record.together.parts == pytest.approx(expected.total, rel=1e-3)
    squares = sum(rate.value**2 for rate in expected.values())
    assert record.together.reinforcement == pytest.approx(moved / math.sqrt(squares), rel=1e-3)


def test_a_recorder_and_a_watch_of_one_step_say_the_same():
    model = ResNet(16, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inputs = batch(0)[2]
    watch = lw.watch(model, optimizer, 1, function_space_every=1, batch=inputs, part=1, probes=6, seed=4)
    # A recorder counts steps from 0, a watch from 1, and either adds the step to its seed.
    recorder = lw.FunctionSpaceRecorder(model, optimizer, 1, probes=6, seed=5)
    backward(model, 0)
    with recorder.step(inputs):
        optimizer.step()
    rates = recorder.records[0].rates
    for name, module in watch.records[0].modules.items():
        assert module.rate == sum(rates[f"{name}.{kind}"].value for kind in ("weight", "bias")), name


@pytest.mark.parametrize("every", [1, 2])
def test_a_watch_measures_a_step_that_a_recorder_surrounds_as_it_does_alone(every):
    """It tells of the step once the recorder is through, by when it has dropped the inputs or has the next step's."""

    def watched(surrounded: bool) -> list[dict[str, float | None]]:
        model = ResNet(16, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        watch = lw.watch(model, optimizer, 1, function_space_every=every)
        recorder = lw.FunctionSpaceRecorder(model, optimizer, 1, probes=2)
        for step in range(4):
            optimizer.zero_grad()
            backward(model, step)
            with recorder.step(batch(0)[2]) if surrounded else nullcontext():
                optimizer.step()
        assert not watch.skipped
        return [{name: module.rate for name, module in record.modules.items()} for record in watch.records]

    alone = watched(False)
    assert all(rate for record in alone[1::every] for rate in record.values())
    assert watched(True) == alone


def test_a_record_and_a_log_show_the_rates_that_the_optimizer_tells():
    model = ResNet(16, 2)
    optimizer = lw.Lanton(lw.param_groups(model), lr=0.01)
    watch = lw.watch(model, optimizer, 1, function_space_every=0)
    for step in range(2):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    told = optimizer.layer_rates()
    assert watch.records[-1].units == told
    logged = RateLog(by="unit")(optimizer)
    assert {name: logged[f"layer_lr/{name}"] for name in told} == {name: rate.lr for name, rate in told.items()}


def test_the_predicted_loss_change_is_the_real_one_for_a_small_step():
    model = ResNet(16, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    watch = lw.watch(model, optimizer)
    before = backward(model, 0)
    optimizer.step()
    assert watch.records[0].loss_change == pytest.approx(backward(model, 0) - before, rel=1e-3)


def test_inputs_are_found_however_the_model_is_called():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, scale=1.0):
            return self.linear(x) * scale

    for call in (
        lambda model, x: model(x),
        lambda model, x: model(x=x),
        lambda model, x: model(x, scale=2.0),
        lambda model, x: model(x, 2.0),
    ):
        model = Two()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        watch = lw.watch(model, optimizer, every=1, function_space_every=2)
        for _ in range(2):
            call(model, torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        assert watch.records[-1].together is not None
    with torch.no_grad():  # nothing is taken from an evaluation
        assert watch.outputs._seen.take() is None


def test_a_model_that_is_trained_in_evaluation_mode_is_measured_on_its_training_inputs():
    """As `from_pretrained` leaves it. What a recorder runs it on is none of them."""
    model = nn.Linear(4, 4).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = lw.watch(model, optimizer, every=1, function_space_every=2)
    recorder = lw.FunctionSpaceRecorder(model, optimizer, every=1)
    for _ in range(4):
        x = torch.randn(8, 4)
        model(x).square().mean().backward()
        assert watch.outputs._seen._seen is None or watch.outputs._seen._seen[0][0] is x
        with recorder.step(torch.randn(8, 4)):
            optimizer.step()
        assert watch.outputs._seen._seen is None or watch.outputs._seen._seen[0][0] is x
    assert not watch.skipped
    assert [record.together is None for record in watch.records] == [True, False, True, False]


def test_a_record_made_under_autocast_is_that_of_without():
    records = []
    for autocast in (False, True):
        torch.manual_seed(0)
        model, x = nn.Linear(64, 64), torch.randn(8, 64)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        watch = lw.watch(model, optimizer, every=1)
        model(x).square().mean().backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            optimizer.step()
        records.append(watch.records[0].to_dict())
    assert records[0] == records[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_model_which_takes_no_hooks_trains_on_and_can_be_described():
    plain, inputs = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(8, 4)
    model = torch.jit.script(plain)
    roles = [[(row.name, row.role) for row in lw.describe(each, inputs).rows] for each in (model, plain)]
    assert roles[0] == roles[1]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = lw.watch(model, optimizer, every=1, function_space_every=2)
    for _ in range(2):
        model(inputs).square().mean().backward()
        with pytest.warns(UserWarning, match=r"give watch\(batch=") if watch.steps else nullcontext():
            optimizer.step()
    assert list(watch.skipped) == [2]


def test_inputs_that_were_not_seen_are_a_reason():
    model = ResNet(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = lw.watch(model, optimizer, every=1, function_space_every=1)

    def train():
        for step in range(3):
            x, y, _ = batch(step)
            nn.functional.cross_entropy(model.forward(x), y).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"step 2 in function space .*give watch\(batch=") as caught:
        train()
    assert len(caught) == 1
    assert "give watch(batch=...)" in watch.skipped[2]
    assert watch.records[-1].together is None


@pytest.mark.parametrize("kind", ["two outputs", "writes its weight"])
def test_a_model_that_cannot_be_measured_trains_on(kind):
    """The watch is two lines in a loop that is hours old at its first measurement: a warning, and the run as it was."""

    class Model(nn.Linear):
        def forward(self, x):
            if kind == "two outputs":
                return super().forward(x), x
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
            return super().forward(x)

    def run(watched):
        torch.manual_seed(0)
        model = Model(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch = lw.watch(model, optimizer, every=2, function_space_every=2) if watched else None
        for _ in range(6):
            outputs = model(torch.randn(8, 4))
            (outputs[0] if isinstance(outputs, tuple) else outputs).square().mean().backward()
            optimizer.step()
        return model, watch

    plain, _ = run(False)
    with pytest.warns(UserWarning, match="watch could not measure step 2 in function space") as caught:
        model, watch = run(True)
    assert len(caught) == 1
    assert torch.equal(model.weight, plain.weight)
    assert [record.step for record in watch.records] == [1, 2, 4, 6]
    said = "pass forward=" if kind == "two outputs" else "the forward writes parameter 'weight'"
    assert list(watch.skipped) == [2, 4, 6]
    assert all(said in reason for reason in watch.skipped.values())


@pytest.mark.parametrize("part", [4, 1])
def test_a_model_whose_state_has_the_whole_batchs_size_is_told_to_give_part_1_which_measures_it(part):
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.state = nn.LSTM(4, 3, batch_first=True), None

        def forward(self, x):
            y, state = self.rnn(x, self.state)
            self.state = tuple(each.detach() for each in state)
            return y

    model = Stateful()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = lw.watch(model, optimizer, every=1, function_space_every=2, part=part)
    for _ in range(2):
        model(torch.randn(8, 5, 4)).square().mean().backward()
        with pytest.warns(UserWarning, match="part=1 takes it whole") if part * watch.steps == 4 else nullcontext():
            optimizer.step()
    assert list(watch.skipped) == [2] * (part > 1)


# ------------------------------------------------------------------------------------------------- what stands out


def planted_run(planted: bool) -> tuple[Tensor, list[lw.WatchRecord]]:
    """A warm-up of 200 steps; the third of six layers has 8 times its rate from step 61 on."""
    model = ResNet(48, 6)
    groups = [{"params": block.parameters()} for block in model.blocks]
    ends = {"params": [*model.inp.parameters(), *model.out.parameters()]}
    optimizer = torch.optim.AdamW([*groups, ends], lr=3e-3)
    watch = lw.watch(model, optimizer, every=10, function_space_every=0)
    losses = []
    for step in range(300):
        for index, group in enumerate(optimizer.param_groups):
            wrong = 8 if planted and index == 2 and step >= 60 else 1
            group["lr"] = 3e-3 * min(1, (step + 1) / 200) * wrong
        optimizer.zero_grad()
        losses.append(backward(model, step))
        optimizer.step()
    return torch.tensor(losses), list(watch.records)


def test_a_layer_at_8_times_its_rate_is_named_50_steps_before_the_loss_shows_it(caplog):
    """At first the loss falls faster than without: only after the warm-up is it worse, for good."""
    losses, records = planted_run(planted=False)
    assert not [line for record in records for line in record.unusual]
    assert not caplog.records
    wrong, records = planted_run(planted=True)
    lines = [line for record in records for line in record.unusual]
    assert {(line.module, line.against) for line in lines} == {
        ("blocks.2", "history"),
        ("blocks.2", "siblings"),
    }
    assert {line.step for line in lines} == {70}
    assert all(line.factor == pytest.approx(8, rel=0.1) for line in lines)
    assert [r.message for r in caplog.records] == [str(line) for line in lines]
    assert "blocks.2 moves" in caplog.text
    worse = (wrong - losses).unfold(0, 20, 1).mean(1) > 0.01  # of a loss of 0.4; it is 0.4 better at step 180
    shown = 20 + next(k for k in range(len(worse)) if worse[k])
    assert shown >= 70 + 50


def test_a_module_that_stops_moving_is_named_once_and_again_after_it_moved():
    rule = lw.UnusualRule(least=2)
    updates = {"a.0": 1.0, "a.1": 1.0, "a.2": 1.0, "b": 5.0}
    stopped = {**updates, "b": 0.0}
    assert [rule.judge(step, updates) for step in (1, 2)] == [[], []]
    [line] = rule.judge(3, stopped)
    assert str(line) == "step 3: b does not move, unlike before, next to the other modules (RMS of its update 0)"
    assert rule.judge(4, stopped) == []
    assert rule.judge(5, updates) == []
    assert len(rule.judge(6, stopped)) == 1
    assert rule.judge(7, dict.fromkeys(updates, 0.0)) == []  # a step that was skipped, or a rate of 0


def test_a_schedule_that_all_modules_follow_is_not_unusual():
    rule = lw.UnusualRule()
    for step in range(1, 30):
        assert rule.judge(step, {"a": 1e-3 * 2**-step, "b": 2e-3 * 2**-step, "c": 9e-3 * 2**-step}) == []


def test_history_begins_anew_where_modules_are_unfrozen_or_frozen():
    """What the others do is told by their median, which is another one then: nobody moves in another way."""
    rule, head, all_of_it = lw.UnusualRule(least=2), {"body": 1.0, "head": 14.0}, {"stem": 2.0, "body": 1.0, "head": 14.0}
    steps = [head] * 4 + [all_of_it] * 4 + [head] * 3
    assert [rule.judge(step, updates) for step, updates in enumerate(steps)] == [[]] * len(steps)
    [unusual] = rule.judge(len(steps), {"body": 8.0, "head": 1.0 * 14})
    assert unusual.module == "body"


def test_the_layers_of_a_chain_are_not_siblings(caplog):
    """The first and the last of an MLP move as far as their own shapes have them, the last one 3 times as far under SGD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = lw.watch(model, optimizer, every=1, function_space_every=0)
    nn.functional.cross_entropy(model(torch.randn(64, 16)), torch.randint(0, 4, (64,))).backward()
    optimizer.step()
    moved = {name: reading.update.update_rms for name, reading in watch.records[0].modules.items()}
    assert moved["4"] > 3 * moved["2"]
    assert not watch.records[0].unusual
    assert not caplog.records


def test_siblings_are_modules_in_the_same_place_of_other_blocks():
    assert siblings_of("h.3.mlp.c_fc") == siblings_of("h.11.mlp.c_fc") == "h.*.mlp.c_fc"
    assert siblings_of("0") == "*"
    assert siblings_of("conv1.proj2") == "conv1.proj2"


# ----------------------------------------------------------------------------------------- where records go, resuming


def short_run(model: nn.Module, steps: int = 4, **options: Any) -> lw.Watch:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = lw.watch(model, optimizer, every=2, function_space_every=4, **options)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return watch


def test_records_go_to_files_functions_tensorboard_and_wandb(tmp_path):
    class Writer:
        def __init__(self):
            self.rows = []

        def add_scalar(self, key, value, step):
            self.rows.append((key, value, step))

    class Run:
        def __init__(self):
            self.rows = []

        def log(self, row, commit):
            self.rows.append(row)

    seen, writer, run = [], Writer(), Run()
    watch = short_run(ResNet(8, 1), to=[tmp_path / "new" / "watch.jsonl", seen.append, writer, run])
    assert seen == list(watch.records)
    lines = [json.loads(line) for line in (tmp_path / "new" / "watch.jsonl").read_text().splitlines()]
    assert lines == [record.to_dict() for record in watch.records]
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert lines[0]["modules"]["out"].keys() >= {
        "lr",
        "weight_rms",
        "update_rms",
        "ratio",
        "spectral",
        "loss_change",
    }
    assert lines[2]["together"].keys() == {"moved", "parts", "independent", "reinforcement"}
    last = watch.records[-1]
    assert [row for row in writer.rows if row[2] == 4] == [(k, v, 4) for k, v in last.scalars().items()]
    assert run.rows[-1] == {**last.scalars(), "watch/step": 4}
    with pytest.raises(lw.LayerwiseError, match="to is int: give a path"):
        short_run(ResNet(8, 1), to=3)
    with pytest.raises(lw.LayerwiseError, match=r"cannot be written to.*name a file"):  # before the first step
        short_run(ResNet(8, 1), steps=0, to=tmp_path)


def test_a_record_prints_as_a_table():
    text = str(short_run(ResNet(8, 1)).records[-1])
    head, titles, first, *_ = text.splitlines()
    assert head == "step 4"
    assert titles.split()[:4] == ["module", "lr", "weight", "update"]
    assert first.startswith("inp")
    assert "predicted change of the loss: -" in text
    assert "reinforcement" in text
    assert " share" in titles


def test_a_record_of_long_names_keeps_within_a_terminal():
    record = short_run(ResNet(8, 1)).records[-1]
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_A.default"
    text = str(replace(record, modules=dict.fromkeys((name, name + "2"), record.modules["out"])))
    lines = text.split("predicted")[0].splitlines()[1:]
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines] == ["module", name, name + "2"] * (len(lines) // 3)
    numbers = [float(cell) for line in lines[1::3] for cell in line.split()[1:]]
    assert numbers == [float(f"{value:.3g}") for value in record.modules["out"].numbers().values()]


def test_printed_tables_of_many_blocks_have_one_line_for_those_that_are_alike():
    model = ResNet(8, 50)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = lw.watch(model, optimizer, every=1, function_space_every=0)
    recorder = lw.FunctionSpaceRecorder(model, optimizer, every=1)
    flerm = lw.FLeRM(model, optimizer)
    for step in (recorder.step, flerm.step):
        optimizer.zero_grad()
        backward(model, 0)
        with step(batch(0)[2]):
            optimizer.step()
    printed = {"blocks.{0-49}": watch.records[0], "blocks.{0-49}.weight": recorder.records[0].rates}
    for name, shown in {**printed, "blocks.{0-49}.bias": flerm.reports[0]}.items():
        folded, whole = (
            [line.split() for line in text.splitlines() if line.startswith("blocks")] for text in (str(shown), shown.table())
        )
        of_blocks = next(row for row in folded if row[0] == name)
        ending = name.removeprefix("blocks.{0-49}")
        columns = [*zip(*(row for row in whole if row[0] == f"blocks.{row[0].split('.')[1]}{ending}"), strict=True)]
        assert len(columns[0]) % 50 == 0  # all are in the whole table, of which a wide one is in two
        values = [float(cell.rstrip("%")) for cell in columns[1]]
        assert of_blocks[1] in (f"{min(values):.3g}..{max(values):.3g}", f"{min(values):.4g}..{max(values):.4g}", "0.1")


def test_a_watch_takes_every_field_of_a_measurement():
    model = nn.Linear(2, 2)
    watch = lw.watch(model, torch.optim.SGD(model.parameters(), 0.1), slices=1, memory=0, batch_norm="batch")
    found = watch.outputs.measurement
    assert (found.slices, found.memory, found.batch_norm, found.probes) == (1, 0, "batch", 8)


def test_a_record_reads_each_module_once_to_print_itself(monkeypatch):
    """With every row it read all modules again: 400 took seven seconds."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(60)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = lw.watch(model, optimizer, 1, function_space_every=0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    asked, numbers = [], ModuleReading.numbers
    monkeypatch.setattr(ModuleReading, "numbers", lambda self: asked.append(self) or numbers(self))
    for shown in (str, lw.WatchRecord.table):
        shown(watch.records[0])
        assert len(asked) == 60
        asked.clear()


def test_a_picture_shows_each_number_of_the_records_in_its_place(tmp_path):
    model = ResNet(8, 3)
    optimizer = lw.DualMuon(lw.param_groups(model), lr=0.01)
    watch = lw.watch(model, optimizer, every=2, function_space_every=4, to=tmp_path / "watch.jsonl")
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    modules = list(watch.records[0].modules)
    for quantity, steps in (("ratio", (1, 2, 4, 6)), ("loss_change", (1, 2, 4, 6)), ("rate", (4,))):
        of_records, of_file = (lw.plot_watch(given, quantity) for given in (watch.records, tmp_path / "watch.jsonl"))
        known = [record for record in watch.records if record.step in steps]
        expected = [[record.modules[name].numbers()[quantity] for record in known] for name in modules]
        for axes in (of_records, of_file):
            assert np.array_equal(axes.collections[0].get_array(), expected)
            assert [label.get_text() for label in axes.get_yticklabels()] == modules
            edges = axes.collections[0].get_coordinates()[0, :, 0]
            assert all(low < step < high for low, step, high in zip(edges, steps, edges[1:], strict=False))
    drawn = lw.plot_watch(watch.records, "multiplier").collections[0]
    units = [f"blocks.{block}.weight" for block in range(3)]
    ruled = [name for name, unit in watch.records[-1].units.items() if unit.squared_norm > 0]
    assert set(units) <= set(ruled)
    assert np.array_equal(drawn.get_array(), [[r.units[name].multiplier for r in watch.records] for name in ruled])
    low, high = drawn.get_clim()
    assert low * high == pytest.approx(1)  # white is 1


def test_a_picture_of_many_blocks_has_those_that_are_alike_together():
    model = ResNet(8, 60)
    watch = short_run(model)
    axes = lw.plot_watch(watch.records, "update_rms")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["inp", "blocks.{0-59}", "out"]
    assert [*axes.get_yticks()] == [0.5, 31.0, 61.5]


def test_a_picture_that_cannot_be_drawn_says_what_can(tmp_path):
    records = short_run(ResNet(8, 1)).records
    with pytest.raises(lw.LayerwiseError, match=r"quantity is 'speed', which none of 3 records has: they have .*ratio"):
        lw.plot_watch(records, "speed")
    with pytest.raises(lw.LayerwiseError, match=r"none\.jsonl.*give the file that watch"):
        lw.plot_watch(tmp_path / "none.jsonl")
    with pytest.raises(lw.LayerwiseError, match="none of 0 records has: they have nothing"):
        lw.plot_watch([])
    model = ResNet(8, 1)
    fixed = lw.DMuon(lw.param_groups(model), rates=lw.StaticRates({"blocks.0.weight": 0.5}))
    for optimizer, units in ((fixed, ["blocks.0.weight"]), (lw.Muon(lw.param_groups(model)), [])):
        watch = lw.watch(model, optimizer, every=1)
        backward(model, 0)
        optimizer.step()
        watch.detach()
        if units:  # which have a multiplier and no norm
            assert [label.get_text() for label in lw.plot_watch(watch.records, "multiplier").get_yticklabels()] == units
        else:
            with pytest.raises(
                lw.LayerwiseError, match="'multiplier', which none of 1 records has: they have gradient"
            ) as told:
                lw.plot_watch(watch.records, "multiplier")
            assert "multiplier" not in str(told.value).partition("they have")[2]
    lines = [json.dumps(record.to_dict()) for record in records]
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("\n".join(reversed(lines)))  # a run that was taken up again, with another interval
    axes = lw.plot_watch(backwards, "lr")
    assert (np.diff(axes.collections[0].get_coordinates()[0, :, 0]) > 0).all()
    cut, other = tmp_path / "cut.jsonl", tmp_path / "other.jsonl"
    cut.write_text("\n".join(lines)[:-9])  # a run that goes on, or was killed
    assert lw.plot_watch(cut, "lr").collections[0].get_array().shape == (3, 2)
    other.write_text("\n".join(["[1]", *lines]))
    with pytest.raises(lw.LayerwiseError, match=r"other\.jsonl, line 1, is no record of a watch: give the file"):
        lw.plot_watch(other)


def test_a_watch_goes_on_where_it_was():
    whole = short_run(ResNet(8, 3), 8)
    model = ResNet(8, 3)
    first = short_run(model, 4)
    state = json.loads(json.dumps(first.state_dict()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    second = lw.watch(model, optimizer, every=2, function_space_every=4)
    second.load_state_dict(state)
    for step in range(4, 8):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    assert [*first.records, *second.records] == list(whole.records)
    assert second.state_dict() == whole.state_dict()


def test_a_detached_watch_leaves_nothing_behind():
    model = ResNet(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = lw.watch(model, optimizer, every=1, function_space_every=1)
    watch.detach()
    backward(model, 0)
    optimizer.step()
    assert not watch.records
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_what_cannot_be_watched_is_refused():
    model = ResNet(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(lw.LayerwiseError, match=r"every=0\): give a whole number from 1 on"):
        lw.watch(model, optimizer, every=0)
    with pytest.raises(lw.LayerwiseError, match="function_space_every is 15: use a multiple of every=10"):
        lw.watch(model, optimizer, function_space_every=15)
    with pytest.raises(lw.LayerwiseError, match="holds none of the model's trainable parameters"):
        lw.watch(ResNet(8, 1), optimizer)


def test_steps_that_are_not_recorded_wait_for_no_device():
    """On tensors without numbers whatever the host would have to wait for fails."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        watch = lw.watch(model, optimizer, every=10)
        watch.load_state_dict({"steps": 1, "rule": watch.rule.state_dict()})
        for step in range(2, 11):
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            if step < 10:
                optimizer.step()
            else:
                with pytest.raises((DataDependentOutputException, RuntimeError)):  # a recorded one does
                    optimizer.step()
    assert watch.steps >= 9
