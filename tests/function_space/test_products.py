"""Moments taken from a product's factors are those of the gradient; weights that products do not explain are left alone."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from layerwise.function_space import function_space_rates
from layerwise.function_space.measuring import moments, runners


class InputsFirst(nn.Module):
    """`x W + b`, as transformers' Conv1D has it."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d_in, d_out)), nn.Parameter(torch.randn(d_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Mixed(nn.Module):
    """Products of each kind, without a bias and on three dimensions, beside weights that are used otherwise."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.conv1d = InputsFirst(6, 7)
        self.last = nn.Linear(7, 5, bias=False)
        self.twice = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.last(self.conv1d(self.first(x).tanh_()).tanh())  # written in place, as nn.ReLU(inplace=True) does
        x = self.twice(self.twice(x).tanh())
        return self.tied(x).tanh() @ self.tied.weight


def mixed():
    torch.manual_seed(0)
    model = Mixed().double()
    return model, {n: torch.randn_like(p) for n, p in model.named_parameters()}, torch.randn(6, 3, 5).double()


@pytest.mark.parametrize("method", ["kronecker", "full_cov", "iid"])
@pytest.mark.parametrize("memory", [0, 1 << 30])
@pytest.mark.parametrize(("piece", "slices"), [(7, 2), (1 << 17, 2), (1 << 17, 1)])
def test_rates_are_those_of_whole_gradients(method, memory, piece, slices, monkeypatch):
    monkeypatch.setattr(moments, "_CPU_PIECE", piece)
    model, update, x = mixed()
    seen = []
    plain = runners.only_products
    monkeypatch.setattr(runners, "only_products", lambda *args: seen.append(plain(*args)) or seen[-1])
    ours = function_space_rates(model, update, x, method=method, probes=6, memory=memory, slices=slices)
    assert all(set(found) == {"first.weight", "conv1d.weight", "last.weight"} for found in seen)
    monkeypatch.setattr(runners, "only_products", lambda *args: {})
    whole = function_space_rates(model, update, x, method=method, probes=6, memory=memory, slices=slices)
    for name in whole:
        # The same sums in another order, in float64.
        assert ours[name].value == pytest.approx(whole[name].value, rel=1e-10), name
        # Full_cov's error hangs on single sums near 0, which keep fewer digits.
        assert ours[name].stderr == pytest.approx(whole[name].stderr, rel=1e-6), name
    assert ours["unused.weight"].value == 0


def test_a_weight_whose_output_reaches_nothing_reads_zero():
    model, update, x = mixed()
    rates = function_space_rates(model, update, x, lambda m, x: m.first(x) + 0 * m.last(x @ torch.ones(5, 7).double()).sum())
    assert rates["last.weight"].value == 0
    assert rates["first.weight"].value > 0


def test_under_autocast_gradients_are_taken_whole(monkeypatch):
    seen = []
    plain = runners.only_products
    monkeypatch.setattr(runners, "only_products", lambda *args: seen.append(plain(*args)) or seen[-1])
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    update = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    function_space_rates(model, update, torch.randn(3, 5), probes=2, autocast=torch.bfloat16)
    assert seen
    assert not any(seen)


class TwoSquare(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def path(self, x):
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize(
    "forward",
    [
        # Its recomputation saves a square weight transposed, which nothing but the numbers would show.
        lambda m, x: torch.utils.checkpoint.checkpoint(m.path, x, use_reentrant=False),
        lambda m, x: torch.func.vmap(m.path)(x),
        lambda m, x: torch.addmm(m.first(x), x, m.second.weight),
    ],
    ids=["checkpoint", "vmap", "addmm onto a matrix"],
)
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_products_of_another_kind_are_left_to_autograd(forward, memory):
    torch.manual_seed(0)
    model = TwoSquare().double()
    update = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    x = torch.randn(3, 4).double()
    exact = function_space_rates(model, update, x, forward, "exact")
    found = function_space_rates(model, update, x, forward, "full_cov", 400, memory=memory)
    for name in exact:  # 4 standard errors
        assert abs(found[name].value - exact[name].value) <= 4 * found[name].stderr, name
