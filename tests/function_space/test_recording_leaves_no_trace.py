"""A run that is measured at every step and one that never is are the same run, bit for bit."""

import copy
import json
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.errors import LayerwiseError
from layerwise.function_space import FLeRM, FunctionSpaceRecorder, function_space_rates
from layerwise.function_space.rates import JsonLines
from layerwise.function_space.steps.watched_step import Record

DTYPES = [torch.float32, torch.bfloat16]


def network() -> nn.Module:
    """Dropout, BatchNorm, a tied weight, a frozen and an unused parameter."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(8, 8),
        nn.Linear(8, 8),
        nn.Linear(8, 4),
    )
    model[5].weight = model[4].weight
    model[0].bias.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return model


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def data(step: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator).to(dtype)
    return (
        x,
        torch.randint(0, 4, (16,), generator=generator),
        torch.randn(8, 6, generator=generator).to(dtype),
    )


def everything(model, optimizer) -> dict:
    """All that a user could see: weights, gradients, buffers, modes, optimizer state and random state."""
    state = {f"w.{n}": p.detach().clone() for n, p in model.named_parameters()}
    state |= {f"g.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state |= {f"b.{n}": b.clone() for n, b in model.named_buffers()}
    for index, entry in optimizer.state_dict()["state"].items():
        state |= {f"o.{index}.{key}": torch.as_tensor(value).clone() for key, value in entry.items()}
    state["modes"] = torch.tensor([m.training for m in model.modules()])
    state["random"] = torch.get_rng_state()
    return state


def run(how: str, dtype: torch.dtype, method: str = "kronecker", memory: int = 0, steps: int = 4):
    model = network().to(dtype)
    optimizer = optimizer_for(model)
    recorder = FunctionSpaceRecorder(model, optimizer, every=1, probes=3, method=method, memory=memory)
    torch.manual_seed(11)
    for step in range(steps):
        x, y, other = data(step, dtype)
        for _ in range(2):  # gradients are accumulated over two micro-batches, and zeroed in place later
            outputs = model(x)
            nn.functional.cross_entropy(outputs, y).backward()
        if how == "plain":
            optimizer.step()
        else:
            with recorder.step(other):
                optimizer.step()
        if step < steps - 1:
            optimizer.zero_grad(set_to_none=False)
    return everything(model, optimizer), recorder, model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("how", "method", "memory"),
    [
        ("batch", "kronecker", 0),
        ("batch", "full_cov", 1 << 20),
        ("batch", "exact", 0),
    ],
)
def test_measured_and_unmeasured_runs_are_equal(dtype, how, method, memory):
    plain, _, _ = run("plain", dtype)
    measured, recorder, _ = run(how, dtype, method, memory)
    assert plain.keys() == measured.keys()
    for key, value in plain.items():
        assert torch.equal(value, measured[key]), key
    assert len(recorder.records) == 4
    for record in recorder.records:
        assert set(record.rates) == {
            "0.weight",
            "1.weight",
            "1.bias",
            "4.weight",
            "4.bias",
            "5.bias",
            "6.weight",
            "6.bias",
            "unused",
        }  # the frozen one is absent, the tied one is there once
        assert record.rates["unused"].value == 0
        assert record.rates["6.weight"].value > 0


def test_the_naive_way_moves_what_ours_does_not():
    """Reference section 5: measuring by a plain forward and backward leaves traces everywhere."""
    model = network()
    optimizer = optimizer_for(model)
    x, y, other = data(0, torch.float32)
    nn.functional.cross_entropy(model(x), y).backward()
    before = everything(model, optimizer)
    outputs = model(other)
    (outputs * torch.randn_like(outputs)).sum().backward()
    after = everything(model, optimizer)
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"g", "b", "random"}

    model = network()
    optimizer = optimizer_for(model)
    nn.functional.cross_entropy(model(x), y).backward()
    before = everything(model, optimizer)
    update = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for method in ("kronecker", "exact"):
        function_space_rates(model, update, other, method=method, probes=2)
    after = everything(model, optimizer)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_user_hooks_and_state_survive_errors():
    model = network()
    optimizer = optimizer_for(model)
    calls = []
    model[6].weight.register_hook(calls.append)
    modes = [m.training for m in model.modules()]
    recorder = FunctionSpaceRecorder(model, optimizer, every=1, probes=2)
    x, y, _other = data(0, torch.float32)
    nn.functional.cross_entropy(model(x), y).backward()
    assert len(calls) == 1
    with recorder.step(x):
        optimizer.step()
    with pytest.raises(RuntimeError), recorder.step(torch.randn(2, 5)):
        optimizer.step()
    assert len(calls) == 1
    assert [m.training for m in model.modules()] == modes
    before = everything(model, optimizer)
    with pytest.raises(KeyError), recorder.step(x):
        raise KeyError
    assert all(torch.equal(v, before[k]) for k, v in everything(model, optimizer).items() if k[0] == "w")
    nn.functional.cross_entropy(model(x), y).backward()
    assert len(calls) == 2


def test_autocast_of_the_caller_is_neither_used_nor_changed():
    model = network().eval()
    update = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    x = torch.randn(4, 6)
    outside = function_space_rates(model, update, x, probes=4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = function_space_rates(model, update, x, probes=4)
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
        assert model(x).dtype == torch.bfloat16
    assert inside == outside
    assert outside.dtype == "float32"
    half = function_space_rates(model, update, x, probes=4, autocast=torch.bfloat16)
    assert half.dtype == "bfloat16"


def test_steps_that_did_not_happen_are_not_measured():
    model = network()
    optimizer = optimizer_for(model)
    recorder = FunctionSpaceRecorder(model, optimizer, every=3, probes=2)
    fetched = []

    def batch():
        fetched.append(recorder.steps)
        return data(0, torch.float32)[2]

    def train(happens: bool, lr: float = 0.01):
        x, y, _ = data(0, torch.float32)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.param_groups[0]["lr"] = lr
        with recorder.step(batch):
            if happens:  # GradScaler does not call step() where gradients overflowed
                optimizer.step()

    train(False)
    train(True, lr=0.0)
    train(True)
    train(True)
    train(True)
    assert [(r.scheduled, r.step) for r in recorder.records] == [(0, 2), (3, 3)]
    assert list(recorder.skipped) == [0, 1]
    assert "not run" in recorder.skipped[0]
    assert "no weight moved" in recorder.skipped[1]
    assert fetched == [2, 3]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_whose_update_is_not_finite_is_not_measured_wherever_the_entry_lies(value):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = FunctionSpaceRecorder(model, optimizer, every=1, probes=2)
    x, y, other = data(0, torch.float32)
    nn.functional.cross_entropy(model(x), y).backward()
    list(model.parameters())[-1].grad[-1] = value
    with recorder.step(other):
        optimizer.step()
    assert recorder.records == []
    assert recorder.skipped == {0: "the update is not finite"}


@pytest.mark.parametrize("make", [FunctionSpaceRecorder, FLeRM])
def test_a_step_that_is_called_without_with_is_told_at_the_next_one(make):
    model = network()
    watcher = make(model, optimizer_for(model))
    for _ in range(3):
        with watcher.step(data(0, torch.float32)[2]):  # none that was entered is told of
            pass
    watcher.step(data(0, torch.float32)[2])
    with pytest.raises(LayerwiseError, match=r"called without `with`.*with NAME\.step\(batch\): optimizer"):
        watcher.step(data(0, torch.float32)[2])


@pytest.mark.parametrize("method", ["full_cov", "exact", "difference"])
def test_rates_on_inputs_that_are_not_finite_are_told(method):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    inputs = torch.ones(8, 4)
    update = {"0.weight": torch.ones(6, 4)}
    inputs[0, 0] = math.nan
    with pytest.warns(UserWarning, match=r"function-space rates of 0\.weight are not finite: look for NaN or inf in"):
        function_space_rates(model, update, inputs, method=method)


def test_records_are_saved_and_resumed(tmp_path):
    model = network()
    optimizer = optimizer_for(model)
    path = tmp_path / "function_space.jsonl"
    recorder = FunctionSpaceRecorder(model, optimizer, every=2, probes=2, sink=path)
    x, y, other = data(0, torch.float32)
    for step in range(5):
        if step == 3:
            state = recorder.state_dict()
            recorder = FunctionSpaceRecorder(model, optimizer, every=2, probes=2, sink=JsonLines(path))
            recorder.load_state_dict(state)
        nn.functional.cross_entropy(model(x), y).backward()
        with recorder.step(other):
            optimizer.step()
    lines = [Record.from_dict(json.loads(line)) for line in path.read_text().splitlines()]
    assert [line.step for line in lines] == [0, 2, 4]
    assert lines[2] == recorder.records[-1]
    assert str(lines[2]) == f"step 4\n{lines[2].rates.table()}"
    assert lines[0].lrs["0.weight"] == 0.01


@pytest.mark.parametrize("kind", [FunctionSpaceRecorder, lw.watch])
def test_a_resumed_run_takes_its_later_records_again(kind, tmp_path):
    """It went on behind what the killed one had written since its checkpoint: steps were there twice."""
    path = tmp_path / "records.jsonl"
    x, y, _ = data(0, torch.float32)

    def train(steps, state=None):
        model = network()
        optimizer = optimizer_for(model)
        options = {"probes": 2, "sink": path} if kind is FunctionSpaceRecorder else {"to": path}
        recorder = kind(model, optimizer, every=2, **options)
        if state is not None:
            recorder.load_state_dict(state)
        for step in range(steps):
            saved = recorder.state_dict() if step == 3 else None
            state = saved or state
            nn.functional.cross_entropy(model(x), y).backward()
            with recorder.step(x) if kind is FunctionSpaceRecorder else nullcontext():
                optimizer.step()
        return state

    def steps():
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]

    state = train(8)
    whole = steps()
    with path.open("a") as file:
        file.write('{"step": 1')  # killed there
    train(5, state)
    assert steps() == whole
    with pytest.warns(UserWarning, match=r"records\.jsonl holds records already.*load_state_dict"):
        train(1)  # another run
    assert steps() == [*whole, whole[0]]


def test_wrapped_models_and_optimizers_are_seen_through():
    model = network()
    optimizer = optimizer_for(model)

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    recorder = FunctionSpaceRecorder(nn.DataParallel(model), Wrapper(optimizer), every=1, probes=2)
    x, y, other = data(0, torch.float32)
    nn.functional.cross_entropy(model(x), y).backward()
    with recorder.step((other,)):
        optimizer.step()
    assert "0.weight" in recorder.records[0].rates
    with pytest.raises(LayerwiseError, match="another copy"):
        FunctionSpaceRecorder(copy.deepcopy(model), optimizer)
    with pytest.raises(LayerwiseError, match=r"pass a torch\.optim\.Optimizer"):
        FunctionSpaceRecorder(model, "adam")
