"""A step never waits for the device.

The tensors here are fake: they have shapes and no numbers, so that any operation whose result the host needs (`item`,
`bool`, `nonzero`, a comparison in an `if`) fails. The guard is told that this device runs ahead of the host.
"""

import pytest
import torch
from tiny import Net, make
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise as lw
from layerwise.geometry import ColNorm, Frobenius, RowNorm, Sign


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Event:
    """Stands for a CUDA event that never arrives."""

    def record(self):
        pass

    def query(self):
        return False


@pytest.fixture(autouse=True)
def a_device_that_runs_ahead(monkeypatch):
    monkeypatch.setattr("layerwise.optim.guard.WITH_EVENTS", ("cpu",))
    # a processor that iterates in bfloat16 looks at norms, which costs it nothing: a device goes the other way
    monkeypatch.setattr("layerwise.geometry.spectral.newton_schulz.PROCESSOR_UNITS", ())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **kw: empty_like(t, **{**kw, "pin_memory": False}))


def steps(model, optimizer):
    with Operations() as seen:
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            optimizer.hold_half()
            optimizer.step()
            optimizer.zero_grad()
    return seen.names


@pytest.mark.parametrize(
    ("name", "tensor_lr", "policy"),
    [
        # the others of tiny.OPTIMIZERS go the same ways
        *((name, False, "raise") for name in ("d-muon-noise", "namo", "static", "lanton")),
        *((name, True, "skip") for name in ("muon", "scion", "lanton-momentum", "lanton-independent")),
    ],
)
def test_no_optimizer_waits(name, tensor_lr, policy):
    with FakeTensorMode():
        model = Net()
        optimizer = make(name, model, nonfinite=policy)
        if tensor_lr:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(0.01)
        names = steps(model, optimizer)
    assert not [n for n in names if "_local_scalar_dense" in n or "nonzero" in n]


@pytest.mark.parametrize("geometry", [RowNorm(), ColNorm(), Frobenius(), Sign()])
def test_no_geometry_waits(geometry):
    with FakeTensorMode():
        model = Net()
        groups = lw.param_groups(model, overrides={"*": geometry})
        rule = lw.NoiseAdaptive(alpha=0.1, anchor="mean", size_normalised=True)
        steps(model, lw.Lanton(groups, rates=rule))


def test_large_matrices_whose_noise_is_estimated():
    with FakeTensorMode():
        model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 300))
        steps(model, lw.Lanton(lw.param_groups(model)))


def test_this_way_of_looking_sees_a_step_that_waits(monkeypatch):
    monkeypatch.setattr("layerwise.optim.guard.WITH_EVENTS", ())
    with FakeTensorMode():
        model = Net()
        optimizer = make("lanton", model)
        with pytest.raises(DataDependentOutputException):
            steps(model, optimizer)
