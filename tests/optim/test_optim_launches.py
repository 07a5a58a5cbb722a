"""What a step launches does not grow with the number of parameters of a shape.

Counted are the operations that torch is asked for, an operation on a list of tensors as one. Not counted are views, and
reading a number that lies on the host: neither is a kernel.
"""

import pytest
import torch
from tiny import OPTIMIZERS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise as lw

#: The most that a step may launch on pairs of one shape of weight and one of bias.
BOUNDS = {
    "muon": 65,
    "d-muon": 70,
    "dual-muon": 125,
    "scion": 70,
    "signum": 25,
    "lanton": 320,
    "lanton-bf16": 320,
    "lanton-momentum": 320,
    "lanton-independent": 320,
    "namo": 140,
    "d-muon-noise": 165,
}


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = [r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns]
        asks = function.namespace != "aten" or function._opname in ("_local_scalar_dense", "promote_types")
        if not asks and not (views and all(views)):
            self.count += 1
        return function(*args, **(kwargs or {}))


def launches(name, make_layer, count):
    """Of the third step."""
    model = nn.ModuleList([make_layer() for _ in range(count)])
    optimizer = OPTIMIZERS[name](lw.param_groups(model))
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.hold_half()
        with Launches() as seen:
            optimizer.step()
    return seen.count


def linear():
    return nn.Linear(16, 16)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_step_launches_as_much_for_a_hundred_parameters_as_for_ten(name):
    few = launches(name, linear, 5)
    assert few <= BOUNDS[name]
    assert launches(name, linear, 50) == few


@pytest.mark.parametrize("name", ["muon", "dual-muon", "scion", "lanton"])
def test_a_step_launches_as_much_for_a_thousand_parameters_as_for_ten(name):
    assert launches(name, linear, 500) == launches(name, linear, 5)


@pytest.mark.parametrize("name", ["muon", "dual-muon", "lanton", "lanton-bf16", "namo"])
def test_where_the_device_runs_ahead_a_step_launches_as_much_for_many_parameters(name, monkeypatch):
    """Every update is then selected on the device; the tensors are fake, as in `test_optim_no_sync.py`."""
    monkeypatch.setattr("layerwise.optim.guard.WITH_EVENTS", ("cpu",))
    # nothing else may be asked of a processor either
    monkeypatch.setattr("layerwise.geometry.spectral.newton_schulz.PROCESSOR_UNITS", ())
    counts = []
    for count in (5, 50):
        with FakeTensorMode():
            model = nn.ModuleList([linear() for _ in range(count)])
            optimizer = OPTIMIZERS[name](lw.param_groups(model), nonfinite="skip")
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            optimizer.step()
            with Launches() as seen:
                optimizer.step()
        counts.append(seen.count)
    assert counts[0] == counts[1] <= 1.5 * BOUNDS[name]


def test_fused_projections_whose_parts_are_of_different_sizes_go_together():
    """Queries, keys and values of grouped attention: three stacks of matrices a parameter."""
    counts = []
    for count in (3, 30):
        model = nn.ModuleList([nn.Linear(16, 32, bias=False) for _ in range(count)])
        split = lw.Split((("q", 2), ("k", 1), ("v", 1)))
        groups = lw.param_groups(model, splits={"*": split})
        optimizer = lw.Lanton(groups)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            with Launches() as seen:
                optimizer.step()
        counts.append(seen.count)
    assert counts[0] == counts[1] <= BOUNDS["lanton"]


def test_matrices_of_groups_with_rates_of_their_own_are_multiplied_together(monkeypatch):
    calls = {}
    multiply = torch.baddbmm

    def counted(*args, **kwargs):
        calls[count] = calls.get(count, 0) + 1
        return multiply(*args, **kwargs)

    monkeypatch.setattr(torch, "baddbmm", counted)
    for count in (3, 30):
        model = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(count)])
        given = [(group, param) for group in lw.param_groups(model) for param in group["params"]]
        apart = [{**group, "params": [param], "lr": 0.01 / (i + 1)} for i, (group, param) in enumerate(given)]
        optimizer = lw.Lanton(apart)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert calls[3] == calls[30] > 0
