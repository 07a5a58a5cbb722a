"""FLeRM: the matched step does to the outputs what the base's did, whatever the optimizer, groups and schedule."""

import copy
import math
import warnings

import pytest
import torch
from reference_model import VECTORS, adam, build, loss
from small_models import ResNet, backward, batch, weights
from torch import nn

import layerwise as lw
from layerwise.errors import LayerwiseError
from layerwise.function_space import (
    BaseRates,
    FLeRM,
    FunctionSpaceRecorder,
    function_space_rates,
    record_base,
)
from layerwise.lab.optimizers.torch_muon import TorchMuon

OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1),
    "torch Muon": lambda m: TorchMuon(lw.param_groups(m), lr=1e-2),
    "Lanton": lambda m: lw.Lanton(lw.param_groups(m), lr=1e-2, weight_decay=0.1),
    "Muon": lambda m: lw.Muon(lw.param_groups(m), lr=1e-2, weight_decay=0.1),
    "Scion": lambda m: lw.Scion(lw.param_groups(m), lr=1e-4),
}


def base_of(make, seeds=(0, 1), every=10**6, steps=1, dtype=torch.float32, **options) -> BaseRates:
    def run(seed):
        model = ResNet(16, 2, seed, dtype)
        recorder = FunctionSpaceRecorder(model, make(model), every, seed=seed, **options)
        for step in range(steps):
            recorder.optimizer.zero_grad()
            backward(model, 50 + 10 * seed + step)
            with recorder.step(batch(seed, dtype)[2]):
                recorder.optimizer.step()
        return recorder

    return record_base(run, seeds)


def targets_of(base: BaseRates, names, step: int = 0) -> dict[str, float]:
    """By hand: two base blocks become four, each with half the rate of base block number // 2."""
    found = {}
    for name in names:
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(int(parts[1]) // 2)
        found[name] = base.records[step][".".join(parts)].value / (2 if parts[0] == "blocks" else 1)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("step", [0, 3])
def test_realised_rates_equal_the_targets_at_the_matched_step(name, step):
    make = OPTIMIZERS[name]
    base = base_of(make, every=3, steps=step + 1)
    model = ResNet(48, 4)
    optimizer = make(model)
    flerm = FLeRM(model, optimizer, base, {"blocks.*": "split"}, at=step, seed=7)
    for t in range(step + 1):
        optimizer.zero_grad()
        backward(model, t)
        before = weights(model)
        with flerm.step(batch(t)[2]):
            optimizer.step()
    update = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    after = weights(model)
    model.load_state_dict(before)
    realised = function_space_rates(model, update, batch(step)[2], seed=7 + step)
    model.load_state_dict(after)
    targets = targets_of(base, realised, step)
    for parameter, rate in realised.items():
        assert rate.value == pytest.approx(targets[parameter], rel=1e-3), parameter
    assert flerm.reports[0].left_alone == {}
    # Matching did something: a wide and deep model does not have the small one's rates by itself.
    assert max(abs(math.log(row.change)) for row in flerm.reports[0].rows.values()) > 0.3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_redone_step_and_all_later_ones_are_those_of_an_optimizer_with_these_rates(name):
    """Against the same optimizer with one group per parameter at the matched rates from the start."""
    make = OPTIMIZERS[name]
    model = ResNet(24, 4, dtype=torch.float64)
    twin, fresh = copy.deepcopy(model), weights(model)
    optimizer = make(model)
    flerm = FLeRM(model, optimizer, base_of(make, dtype=torch.float64), {"blocks.*": "split"})
    reference = make(twin)
    losses = []
    for t in range(4):
        optimizer.zero_grad()
        losses.append(backward(model, t))
        with flerm.step(batch(t, torch.float64)[2]):
            optimizer.step()
    names = {id(p): n for n, p in twin.named_parameters()}
    split = []
    for group in reference.param_groups:
        for index, p in enumerate(group["params"]):
            part = {**group, "params": [p], "lr": flerm.learning_rates()[names[id(p)]]}
            if "param_names" in group:
                part["param_names"] = [group["param_names"][index]]
            split.append(part)
    reference.param_groups = split
    # Rounding only: the redone step is old + m * (new - old) in float64, and training amplifies it a little (in float32
    # AdamW turns rounding noise of small gradients into whole steps). torch's Muon orthogonalises in bfloat16.
    close = 2**-8 if name == "torch Muon" else 1e-10
    for t in range(4):
        reference.zero_grad()
        assert backward(twin, t) == pytest.approx(losses[t], rel=close)
        reference.step()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        moved = (q - fresh[n]).norm()
        assert (p - q).norm() <= 20 * close * moved, n


@pytest.mark.parametrize("method", ["kronecker", "full_cov", "iid"])
def test_final_weights_of_the_authors_runs_are_reproduced(method):
    """With the rates that their probes gave, our redone step and named rates end at their weights (float64)."""
    vector = VECTORS[f"mlp/{method}/flerm_first_step_only"]
    model = build()
    optimizer = adam(model, vector["lr"])
    flerm = FLeRM(model, optimizer)
    matched = vector["calls"][-1]["lrs_after"]
    flerm._targets = lambda now, scheduled: (
        {name: measured[name] * matched[name] / vector["lr"] for name in matched},
        {},
    )
    for t in range(vector["steps"]):
        optimizer.zero_grad()
        loss(model, t).backward()
        if t == 0:
            before = weights(model)
            shadow = copy.deepcopy(model)
            shadow_optimizer = adam(shadow, vector["lr"])
            loss(shadow, 0).backward()
            shadow_optimizer.step()
            update = {n: p.detach() - before[n] for n, p in shadow.named_parameters()}
            x = torch.randn(8, 6, dtype=torch.float64)
            measured = {n: r.value for n, r in function_space_rates(model, update, x).items()}
        with flerm.step(x):
            optimizer.step()
    for name, p in model.named_parameters():
        assert p.sum().item() == pytest.approx(vector["final_param_sum"][name], abs=1e-12)
        assert p.abs().sum().item() == pytest.approx(vector["final_param_abs_sum"][name], rel=1e-12)


def test_first_matching_does_not_depend_on_the_rate_the_base_was_recorded_at():
    """Adam's first update over lr is free of lr: one recording serves a sweep."""
    found = []
    for lr in (1e-4, 1e-2):
        base = base_of(lambda m, lr=lr: torch.optim.Adam(m.parameters(), lr=lr))
        model = ResNet(48, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        flerm = FLeRM(model, optimizer, base, {"blocks.*": "split"})
        backward(model, 0)
        with flerm.step(batch(0)[2]):
            optimizer.step()
        found.append(flerm.learning_rates())
    for name, lr in found[0].items():
        assert lr == pytest.approx(found[1][name], rel=1e-3)  # float32 rounding of W + 1e-4 u


def test_uniform_mode_gives_every_base_tensor_an_equal_part():
    model = ResNet(32, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    flerm = FLeRM(model, optimizer, "uniform", {"blocks.*": 2}, method="exact")
    backward(model, 0)
    with flerm.step(batch(0)[2]):
        optimizer.step()
    count = 2 + 2 * 2 + 2  # inp, two base blocks, out: weights and biases
    for name, row in flerm.reports[0].rows.items():
        assert row.target == pytest.approx(0.02 / count / (2 if name.startswith("blocks") else 1))


def test_groups_in_any_order_and_split_get_their_own_rates():
    """Reference section 5: permuted groups got each other's rates."""
    base = base_of(OPTIMIZERS["Adam"])
    found = []
    for order in ("plain", "reversed", "two groups", "permuted singles"):
        model = ResNet(48, 4)
        parameters = list(model.parameters())
        groups = {
            "plain": [{"params": parameters}],
            "reversed": [{"params": parameters[::-1]}],
            "two groups": [{"params": parameters[5:]}, {"params": parameters[:5]}],
            "permuted singles": [{"params": [p]} for p in reversed(parameters)],
        }[order]
        optimizer = torch.optim.Adam(groups, lr=1e-2)
        flerm = FLeRM(model, optimizer, base, {"blocks.*": "split"})
        for t in range(3):
            optimizer.zero_grad()
            backward(model, t)
            with flerm.step(batch(t)[2]):
                optimizer.step()
        assert [g["lr"] for g in optimizer.param_groups] == [1e-2] * len(groups)
        found.append((flerm.learning_rates(), weights(model)))
    for rates, after in found[1:]:
        assert rates == found[0][0]
        # foreach and single-tensor Adam may round differently.
        assert all(torch.allclose(after[n], w, rtol=1e-5, atol=1e-7) for n, w in found[0][1].items())


def test_rates_of_the_bases_groups_are_kept():
    """Reference section 5: per-group rates were replaced by one outer rate."""

    def two_rates(model, out=1e-3, rest=1e-2):
        named = [p for n, p in model.named_parameters() if not n.startswith("out")]
        return torch.optim.Adam([{"params": named, "lr": rest}, {"params": model.out.parameters(), "lr": out}])

    base = base_of(two_rates)
    for options, lrs in [({}, (1e-3, 1e-2)), ({"lr": "base"}, (5e-2, 5e-2))]:
        model = ResNet(48, 4)
        optimizer = two_rates(model, *lrs)
        flerm = FLeRM(model, optimizer, base, {"blocks.*": "split"}, **options)
        backward(model, 0)
        with flerm.step(batch(0)[2]):
            optimizer.step()
        for name, target in targets_of(base, flerm.reports[0].rows).items():
            assert flerm.reports[0].rows[name].target == pytest.approx(target, rel=1e-9)
    twice = ResNet(48, 4)
    optimizer = two_rates(twice, 2e-3, 2e-2)
    flerm = FLeRM(twice, optimizer, base, {"blocks.*": "split"})
    backward(twice, 0)
    with flerm.step(batch(0)[2]):
        optimizer.step()
    assert flerm.reports[0].rows["inp.bias"].target == pytest.approx(2 * base.records[0]["inp.bias"].value, rel=1e-9)
    with pytest.raises(LayerwiseError, match="lr='base'"):
        FLeRM(twice, torch.optim.Adam(twice.parameters(), lr=1e-2), base, {"blocks.*": "split"})


SCHEDULES = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "chainable": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    "OneCycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    "HF warm-up": lambda o: pytest.importorskip("transformers").get_cosine_schedule_with_warmup(o, 2, 10),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on_from_the_matched_rates(name):
    """Reference section 5: LambdaLR, and so every HF schedule, overwrote the matched rates."""
    model = ResNet(32, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    plain = torch.optim.Adam(ResNet(32, 4).parameters(), lr=1e-2)
    schedule, expected = SCHEDULES[name](optimizer), SCHEDULES[name](plain)
    flerm = FLeRM(model, optimizer, base_of(OPTIMIZERS["Adam"]), {"blocks.*": "split"})
    multipliers = None
    for t in range(6):
        optimizer.zero_grad()
        backward(model, t)
        before = weights(model)
        with flerm.step(batch(t)[2]):
            optimizer.step()
        group = optimizer.param_groups[0]["lr"]
        assert group == plain.param_groups[0]["lr"]
        if flerm.reports:
            multipliers = multipliers or dict(flerm.named.multipliers)
            assert flerm.learning_rates() == {n: group * m for n, m in multipliers.items()}
            # Adam's steps are bounded by lr / sqrt(1 - beta2): far from it only if the rate were another one.
            moved = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters()}
            assert all(moved[n] <= 4 * lr + 1e-7 for n, lr in flerm.learning_rates().items())
        plain.step()
        schedule.step()
        expected.step()
    assert len(flerm.reports) == 1
    assert (name == "HF warm-up") == (0 in flerm.skipped)  # lr = 0 at warm-up step 0: matched at the next


@pytest.mark.parametrize("name", ["Adam", "SGD", "Lanton"])
def test_a_resumed_run_is_the_uninterrupted_one(name):
    base = base_of(OPTIMIZERS[name])

    def start(seed=0):
        model = ResNet(32, 4, seed)
        optimizer = OPTIMIZERS[name](model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        return model, optimizer, schedule, FLeRM(model, optimizer, base, {"blocks.*": "split"})

    def train(parts, steps):
        model, optimizer, schedule, flerm = parts
        for t in steps:
            optimizer.zero_grad()
            backward(model, t)
            with flerm.step(batch(t)[2]):
                optimizer.step()
            schedule.step()

    whole = start()
    train(whole, range(6))
    first = start()
    train(first, range(3))
    saved = [copy.deepcopy(part.state_dict()) for part in first]
    second = start(seed=9)
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    train(second, range(3, 6))
    assert second[3].learning_rates() == whole[3].learning_rates()
    assert len(second[3].reports) == 0  # it does not match again
    for p, q in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(LayerwiseError, match="another model"):
        second[3].load_state_dict({"multipliers": {"a": 1.0}, "steps": 0, "pending": None})


def test_matching_again_every_few_steps_uses_the_bases_record_of_that_step():
    base = base_of(OPTIMIZERS["Adam"], every=2, steps=5)
    model = ResNet(32, 4)
    optimizer = OPTIMIZERS["Adam"](model)
    flerm = FLeRM(model, optimizer, base, {"blocks.*": "split"}, every=2)
    for t in range(5):
        optimizer.zero_grad()
        backward(model, t)
        with flerm.step(lambda t=t: batch(t)[2]):
            optimizer.step()
    assert [report.step for report in flerm.reports] == [0, 2, 4]
    for report in flerm.reports:
        targets = targets_of(base, report.rows, report.step)
        for name, row in report.rows.items():
            assert row.target == pytest.approx(targets[name], rel=1e-9)
            assert row.measured * row.change == pytest.approx(row.target, rel=1e-9)
    with pytest.raises(LayerwiseError, match="no record of step 1"):
        FLeRM(model, optimizer, base, {"blocks.*": "split"}, at=1)
    for t in range(5, 8):  # the base ends at step 4, and so does matching
        backward(model, t)
        with flerm.step():
            optimizer.step()
    with pytest.raises(LayerwiseError, match="no record of step 3"):  # at once, not in step 3
        FLeRM(model, optimizer, base, {"blocks.*": "split"}, every=3)


@pytest.mark.parametrize("schedule", ["warm-up", "OneCycle"])
def test_the_bases_own_rate_is_the_one_without_its_schedule(schedule):
    """A base of step 0 of a warm-up would give a tenth of what was tuned, a rise to OneCycle's max_lr 25 times that."""

    def warm_up(o):
        return torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, (t + 1) / 10))

    def scheduled(model):
        optimizer = OPTIMIZERS["AdamW"](model)
        warm_up(optimizer)
        return optimizer

    plain = base_of(OPTIMIZERS["AdamW"], seeds=(0,))
    base = base_of(scheduled, seeds=(0,)) if schedule == "warm-up" else plain
    assert base.records[0]["out.weight"].unscheduled == 1e-2
    model = ResNet(32, 4)
    optimizer = OPTIMIZERS["AdamW"](model)
    if schedule == "warm-up":
        warm_up(optimizer)
    else:
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10, cycle_momentum=False)
    now = optimizer.param_groups[0]["lr"]
    flerm = FLeRM(model, optimizer, base, {"blocks.*": "split"}, lr="base")
    backward(model, 0)
    with flerm.step(batch(0)[2]):
        optimizer.step()
    targets = targets_of(plain, flerm.parameters)
    for name, row in flerm.reports[0].rows.items():
        assert row.target == pytest.approx(targets[name] * now / 1e-2, rel=1e-3), name  # decay is not linear in lr


def test_decay_can_stay_constant():
    """lr * weight_decay is what the group says, and the rest of the step is matched."""
    for decay in ("scaled", "constant"):
        make = lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.5)  # noqa: E731
        base = base_of(make, decay=decay)
        model = ResNet(48, 4)
        optimizer = make(model)
        flerm = FLeRM(model, optimizer, base, {"blocks.*": "split"}, decay=decay)
        for t in range(2):
            optimizer.zero_grad()
            backward(model, t)
            before = weights(model)
            reference = copy.deepcopy(model)
            for p, q in zip(reference.parameters(), model.parameters(), strict=True):
                p.grad = q.grad.clone()
            state = copy.deepcopy(optimizer.state_dict()["state"])
            with flerm.step(batch(t)[2]):
                optimizer.step()
            for index, (name, p) in enumerate(reference.named_parameters()):
                lr = flerm.learning_rates()[name]
                wd = 0.5 if decay == "scaled" else 0.5 * 1e-2 / lr
                single = torch.optim.AdamW([p], lr=lr, weight_decay=wd)
                if state:
                    single.state[p] = state[index]
                single.step()
                assert torch.allclose(p, dict(model.named_parameters())[name], rtol=1e-4, atol=1e-6), (
                    decay,
                    t,
                    name,
                )
                assert not torch.equal(p, before[name])
    with pytest.raises(LayerwiseError, match="decoupled"):
        FLeRM(model, torch.optim.Adam(model.parameters(), weight_decay=0.1), "uniform", decay="constant")
    with pytest.raises(LayerwiseError, match="decay is 'constant', the base has 'scaled'"):
        FLeRM(model, make(model), base_of(make), {"blocks.*": "split"}, decay="constant")


def test_changes_are_clamped_and_fixed_parameters_stay():
    model = ResNet(48, 4)
    optimizer = OPTIMIZERS["Adam"](model)
    flerm = FLeRM(model, optimizer, base_of(OPTIMIZERS["Adam"]), {"blocks.*": "split"}, max_change=2, fixed=["out.*"])
    backward(model, 0)
    with flerm.step(batch(0)[2]):
        optimizer.step()
    rows = flerm.reports[0].rows
    assert rows["out.weight"].change == 1
    assert rows["out.weight"].note == "fixed"
    assert rows["blocks.1.weight"].change == 0.5
    assert rows["blocks.1.weight"].note.startswith("clamped from 0.")
    assert 0.5 < rows["inp.weight"].change < 2
    assert "clamped" in str(flerm.reports[0])
    with pytest.raises(LayerwiseError, match="fits no parameter"):
        FLeRM(model, optimizer, fixed=["lora*"])


@pytest.mark.parametrize("near_zero", [None, 0.0, 0.3, 1.0])
def test_rates_near_zero_keep_their_learning_rates(near_zero):
    """All are above the default bound here. Targets are equal, so matched rates move all outputs by as much."""
    model = ResNet(32, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    flerm = FLeRM(model, optimizer, method="exact", near_zero=near_zero)
    backward(model, 0)
    with flerm.step(batch(0)[2]):
        optimizer.step()
    rows = flerm.reports[0].rows
    bound = (near_zero or 0.0) * math.hypot(*(row.measured for row in rows.values()))
    kept = [name for name, row in rows.items() if row.measured < bound]
    assert len(kept) == {None: 0, 0.0: 0, 0.3: len(kept), 1.0: len(rows)}[near_zero]
    assert near_zero != 0.3 or 0 < len(kept) < len(rows)
    assert list(flerm.reports[0].left_alone) == kept
    for name, row in rows.items():
        change = 1.0 if name in kept else row.target / row.measured
        assert flerm.learning_rates()[name] == pytest.approx(0.02 * change)
    with pytest.raises(LayerwiseError, match=r"FLeRM\(near_zero=-1\): give a number from 0 to 1"):
        FLeRM(model, optimizer, near_zero=-1)


@pytest.mark.parametrize(
    ("scale", "said"), [(0.0, r"match later \(at=5\)"), (1e-3, r"raised 2 .* 100 times \(0.weight, 0.b")]
)
def test_what_lies_before_a_layer_that_starts_at_0_or_next_to_it_is_told_with_what_to_do(scale, said):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    with torch.no_grad():
        model[2].weight.mul_(scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x = torch.randn(16, 8)
    flerm = FLeRM(model, optimizer, method="exact")
    model(x).sum().backward()
    with pytest.warns(UserWarning, match=said), flerm.step(x):
        optimizer.step()


def test_a_group_that_joins_after_flerm_was_made_is_told_at_the_next_match():
    model = ResNet(16, 2)
    optimizer = torch.optim.SGD(model.inp.parameters(), lr=0.02)
    flerm = FLeRM(model, optimizer, "uniform", every=1, probes=2)
    optimizer.add_param_group({"params": [model.blocks[0].weight]})
    backward(model, 0)
    with (
        pytest.raises(LayerwiseError, match=r"got blocks\.0\.weight after FLeRM was made: detach\(\) it and make another"),
        flerm.step(batch(0)[2]),
    ):
        optimizer.step()


def test_groups_are_whole_again_when_a_step_raises():
    model = ResNet(16, 2)
    optimizer = OPTIMIZERS["SGD"](model)
    flerm = FLeRM(model, optimizer, "uniform", probes=2)
    backward(model, 0)
    with flerm.step(batch(0)[2]):
        optimizer.step()
    original = optimizer.param_groups

    def fail(*_):
        raise KeyError

    failing = optimizer.register_step_pre_hook(fail)  # after ours: the groups are split when it raises
    with pytest.raises(KeyError), flerm.step():
        optimizer.step()
    assert optimizer.param_groups is original
    with pytest.raises(KeyError):
        optimizer.step()  # outside the context
    assert optimizer.param_groups is not original
    failing.remove()
    optimizer.step()
    assert optimizer.param_groups is original
    assert len(original) == 1
    flerm.detach()
    rate_before = weights(model)["out.bias"]
    optimizer.zero_grad()
    backward(model, 0)
    optimizer.state.clear()
    optimizer.step()
    expected = rate_before - 0.1 * (model.out.bias.grad + 0.01 * rate_before)
    assert torch.allclose(model.out.bias, expected, atol=1e-7)


class Counting(torch.optim.Optimizer):
    """Keeps counters in its groups, one as a number and one as a tensor, like older optimizers do."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "step": 0, "ticks": torch.zeros(())})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] += 1
            group["ticks"] += 1
            for p in group["params"]:
                p.sub_(p.grad, alpha=float(group["lr"]))


def test_counters_in_groups_advance_once_per_step():
    model = ResNet(16, 2)
    optimizer = Counting(model.parameters(), 0.1)
    flerm = FLeRM(model, optimizer, "uniform", probes=2)
    for t in range(3):
        optimizer.zero_grad()
        backward(model, t)
        with flerm.step(batch(t)[2]):
            optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3
    assert optimizer.param_groups[0]["ticks"] == 3


def test_tensor_rates_and_scalers_work():
    model = ResNet(16, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-2))
    flerm = FLeRM(model, optimizer, "uniform", probes=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(3):
        optimizer.zero_grad()
        x, y, other = batch(t)
        value = nn.functional.cross_entropy(model(x), y)
        scaler.scale(value if t else value * math.inf).backward()
        before = weights(model)
        with flerm.step(other):
            scaler.step(optimizer)
        scaler.update()
        if t == 0:
            assert all(torch.equal(w, before[n]) for n, w in weights(model).items())
    assert list(flerm.skipped) == [0]
    assert [report.step for report in flerm.reports] == [1]
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_later_steps_take_the_rates_that_are_claimed(name):
    """Against twins that have the one rate in all groups, one for each parameter."""
    model = ResNet(16, 2, 0)
    flerm = FLeRM(model, OPTIMIZERS[name](model), "uniform", probes=8)
    for step in range(2):
        model.zero_grad()
        backward(model, step)
        with flerm.step(batch(0)[2]):
            flerm.optimizer.step()
    before, claimed = weights(model), flerm.learning_rates()
    again, state = copy.deepcopy(model), copy.deepcopy(flerm.optimizer.state_dict())
    model.zero_grad()
    backward(model, 2)
    with flerm.step(batch(0)[2]):
        flerm.optimizer.step()
    for parameter, rate in claimed.items():
        twin = copy.deepcopy(again)
        optimizer = OPTIMIZERS[name](twin)
        optimizer.load_state_dict(copy.deepcopy(state))
        for group in optimizer.param_groups:
            group["lr"] = rate
        backward(twin, 2)
        optimizer.step()
        torch.testing.assert_close(weights(model)[parameter], weights(twin)[parameter], rtol=1e-6, atol=1e-7)
        assert not torch.equal(before[parameter], weights(model)[parameter])


def test_one_flerm_at_a_time():
    """Two would split each other's groups, and rates would grow at every step."""
    model = ResNet(16, 2, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = FLeRM(model, optimizer, "uniform", probes=2)
    with pytest.raises(LayerwiseError, match=r"detach\(\)"):
        FLeRM(model, optimizer, "uniform", probes=2)
    first.detach()
    FLeRM(model, optimizer, "uniform", probes=2)


def surrounded(flerm, model, t):
    """One step; how far the weight of the first block went."""
    weight = model.blocks[0].weight.detach().clone()
    flerm.optimizer.zero_grad()
    model.zero_grad()
    backward(model, t)
    with flerm.step(batch(t)[2]):
        flerm.optimizer.step()
    return (model.blocks[0].weight - weight).norm().item()


@pytest.mark.parametrize("name", ["SGD", "Lanton"])
def test_a_parameter_that_is_replaced_keeps_its_rate_and_is_trained(name):
    """It took the groups' rate; one that our optimizers follow in their step moved once, and then no more."""
    found = []
    for replace in (False, True):
        model = ResNet(32, 2)
        optimizer = OPTIMIZERS[name](model)
        flerm = FLeRM(model, optimizer, base_of(OPTIMIZERS[name]))
        moved = [surrounded(flerm, model, 0)]
        if replace:
            old = model.blocks[0].weight
            new = torch.nn.Parameter(old.detach().clone())
            model.blocks[0].weight = new
            if name == "SGD":  # which follows nobody
                optimizer.state[new] = optimizer.state.pop(old)
                for group in optimizer.param_groups:
                    group["params"] = [new if p is old else p for p in group["params"]]
        moved += [surrounded(flerm, model, t) for t in (1, 2, 3)]
        found.append((moved, flerm.learning_rates()))
    assert flerm.named.multipliers["blocks.0.weight"] != 1
    assert found[1][1] == found[0][1]
    assert found[1][0] == pytest.approx(found[0][0], rel=0.2)  # Lanton's noise begins afresh


def test_a_compiled_step_takes_the_matched_rates():
    """Its trace held the groups as they were: matched rates had no effect, in silence."""
    found = []
    for compiled in (False, True):
        model = ResNet(16, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        flerm = FLeRM(model, optimizer, max_change=8)
        for t in range(3):
            optimizer.zero_grad()
            backward(model, t)
            with flerm.step(batch(t)[2]):
                step()
        found.append([p.detach().clone() for p in model.parameters()])
        assert len(optimizer.param_groups) == 1
        torch._dynamo.reset()
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-7)


def test_what_is_unfrozen_under_matched_rates_is_trained_from_then_on():
    model = ResNet(32, 2)
    model.blocks[0].requires_grad_(False)
    optimizer = OPTIMIZERS["Muon"](model)
    flerm = FLeRM(model, optimizer, "uniform")
    surrounded(flerm, model, 0)
    model.blocks[0].requires_grad_(True)
    with pytest.warns(UserWarning, match="had been frozen"):
        assert surrounded(flerm, model, 1) > 0
    with pytest.warns(UserWarning, match=r"got blocks\.0\.bias, blocks\.0\.weight after rates were matched"):
        assert surrounded(flerm, model, 2) > 0
    assert surrounded(flerm, model, 3) > 0
    assert flerm.learning_rates()["blocks.0.weight"] == optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("base", ["uniform", "file"])
def test_what_was_frozen_before_the_match_is_left_out(base):
    model = ResNet(32, 2)
    optimizer = OPTIMIZERS["Adam"](model)
    flerm = FLeRM(model, optimizer, "uniform" if base == "uniform" else base_of(OPTIMIZERS["Adam"]))
    model.blocks[0].requires_grad_(False)
    assert surrounded(flerm, model, 0) == 0
    assert flerm.reports[0].rows.keys() == dict(model.named_parameters()).keys() - {"blocks.0.weight", "blocks.0.bias"}


def test_steps_that_flerm_does_not_see_are_told():
    base = base_of(OPTIMIZERS["Adam"])
    model = ResNet(32, 2)
    optimizer = OPTIMIZERS["Adam"](model)
    flerm = FLeRM(model, optimizer, base)
    backward(model, 0)
    with pytest.warns(UserWarning, match="outside of FLeRM's step"):
        optimizer.step()
    with warnings.catch_warnings(action="error"):
        optimizer.step()
    flerm.detach()
    resumed = FLeRM(model, optimizer, base)  # and no load_state_dict
    with pytest.warns(UserWarning, match=r"has taken 3 steps and FLeRM has seen 1 .*loads flerm\.state_dict\(\)"):
        surrounded(resumed, model, 1)


def test_one_that_was_refused_leaves_nothing_on_the_optimizer():
    model = ResNet(16, 2)
    optimizer = OPTIMIZERS["Adam"](model)
    flerm = FLeRM(model, optimizer)
    with pytest.raises(LayerwiseError, match="sets this optimizer's learning rates already"):
        FLeRM(model, optimizer)
    with warnings.catch_warnings(action="error"):  # the refused one would tell of a step that it does not see
        surrounded(flerm, model, 0)


def test_several_steps_in_one_are_told():
    model = ResNet(16, 2)
    recorder = FunctionSpaceRecorder(model, OPTIMIZERS["Adam"](model))
    backward(model, 0)
    with pytest.warns(UserWarning, match="ran 2 times in one `with`"), recorder.step(batch(0)[2]):
        any(recorder.optimizer.step() for _ in range(2))


def test_steps_that_never_move_anything_are_told_once():
    model = ResNet(16, 2)
    optimizer = OPTIMIZERS["Adam"](model)
    flerm = FLeRM(model, optimizer)
    with warnings.catch_warnings(action="error"):
        for _ in range(19):
            with flerm.step(batch(0)[2]):
                optimizer.step()  # backward() was forgotten
    with (
        pytest.warns(UserWarning, match=r"FLeRM found nothing to measure in 20 steps.*or no gradients"),
        flerm.step(batch(0)[2]),
    ):
        optimizer.step()
    with warnings.catch_warnings(action="error"), flerm.step(batch(0)[2]):
        optimizer.step()


def test_rates_of_the_base_that_nothing_takes_are_told():
    def build_small(width, layers):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, width), *(torch.nn.Linear(width, width) for _ in range(layers)))

    small = build_small(4, 2)
    recorder = FunctionSpaceRecorder(small, torch.optim.SGD(small.parameters(), lr=0.1))
    small(torch.randn(8, 6)).square().mean().backward()
    with recorder.step(torch.randn(8, 6)):
        recorder.optimizer.step()
    large = build_small(8, 1)  # its last layer has the name of the base's middle one
    with pytest.warns(UserWarning, match=r"2 parameters that nothing here takes \('2\.weight', '2\.bias'\)"):
        FLeRM(large, torch.optim.SGD(large.parameters(), lr=0.1), BaseRates.of(recorder))
