"""The rivals and controls of `benchmarks/rate_rule.py`, each against a literal twin in float64."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import layerwise as lw

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LR, STEPS = 0.01, 8
#: Everything is float64 but the multipliers, which are kept in float32.
FLOAT32 = 4 * torch.finfo(torch.float32).eps


@pytest.fixture
def rivals(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rate_rule_rivals

    return rate_rule_rivals


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6), nn.Linear(6, 7)).double()


def groups_of(model):
    exact = {"1.weight": lw.Spectral(polar="svd"), "3.weight": lw.Spectral(polar="svd")}
    return lw.param_groups(model, torch.arange(5), overrides=exact)


def loss_of(model, step):
    tokens = torch.randint(7, (12,), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens), tokens.roll(1))


def polar(m):
    u, _, vt = np.linalg.svd(m, full_matrices=False)
    return u @ vt


def test_the_update_floor_is_the_weights_norm_over_the_polar_factors(rivals):
    model = network()
    with torch.no_grad():
        model[1].weight *= 20.0  # above the floor; the other stays below it
    optimizer = lw.DMuon(groups_of(model), lr=LR, weight_decay=0.0, rates=rivals.UpdateFloor(0.35))
    twin = {i: model[i].weight.detach().numpy().copy() for i in (1, 3)}
    average = {i: np.zeros_like(w) for i, w in twin.items()}
    for step in range(STEPS):
        model.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        for i, w in twin.items():
            g = model[i].weight.grad.numpy()
            average[i] = 0.95 * average[i] + 0.05 * g
            o = polar(0.95 * average[i] + 0.05 * g)
            multiplier = max(1.0, 0.35 * np.linalg.norm(w) / np.linalg.norm(o))
            twin[i] = w - LR * multiplier * 0.2 * math.sqrt(max(w.shape)) * o
            assert optimizer.layer_rates()[f"{i}.weight"].multiplier == pytest.approx(multiplier, rel=FLOAT32)
            np.testing.assert_allclose(model[i].weight.detach().numpy(), twin[i], rtol=0, atol=LR * FLOAT32 * STEPS * 10)
    multipliers = [optimizer.layer_rates()[f"{i}.weight"].multiplier for i in (1, 3)]
    assert multipliers[0] > 1.5 > 1.0 == multipliers[1]


def test_permuted_multipliers_are_the_rules_own_at_other_units(rivals):
    def multipliers(rule):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(9)))
        optimizer = lw.DMuon(lw.param_groups(model, overrides={"*": {"role": "hidden"}}), rates=rule)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for i, p in enumerate(model.parameters()):
                p.grad = (i + 1.0) * torch.randn(p.shape, generator=generator)
            optimizer.step()
        return [optimizer.layer_rates()[f"{i}.weight"].multiplier for i in range(9)]

    own, first, again = (
        multipliers(rule) for rule in (lw.DualNormAdaptive(), rivals.PermutedDualNorm(), rivals.PermutedDualNorm())
    )
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()
    assert order != sorted(order)
    assert first == again == [own[i] for i in order]
    assert multipliers(rivals.PermutedDualNorm(seed=1)) != first


def test_frozen_multipliers_are_means_by_unit_or_by_kind_over_blocks(rivals):
    means = {"model.layers.0.q.weight": 0.5, "model.layers.1.q.weight": 1.5, "model.layers.1.up.weight": 2.0}
    assert rivals.by_unit(means) == means
    assert rivals.by_kind(means) == {
        "model.layers.0.q.weight": 1.0,
        "model.layers.1.q.weight": 1.0,
        "model.layers.1.up.weight": 2.0,
    }


class MomoTwin:
    """MuonMax-Momo literally: two loops over all parameters, NumPy."""

    def __init__(self, weights, matrices, decayed, lr, bound):
        self.w, self.matrices, self.decayed = copy.deepcopy(weights), matrices, decayed
        self.lr, self.bound, self.f = lr, bound, None
        self.m, self.v, self.rate = {}, {}, None

    def step(self, loss, gradients):
        nuclear, square, model_now, model_mean = 0.0, 0.0, loss, 0.0
        for name, g in gradients.items():
            self.m[name] = g if name not in self.m else 0.95 * self.m[name] + 0.05 * g
            self.v[name] = g**2 if name not in self.v else 0.95 * self.v[name] + 0.05 * g**2
            model_now -= (g * self.w[name]).sum()
            model_mean += (self.m[name] * self.w[name]).sum()
            if name in self.matrices:
                nuclear += np.linalg.svd(self.m[name], compute_uv=False).sum()
            else:
                square += (self.m[name] ** 2 / (np.sqrt(self.v[name]) + 1e-8)).sum()
        self.f = model_now if self.f is None else 0.95 * self.f + 0.05 * model_now
        self.rate = min(self.lr, max(self.f - self.bound + model_mean, 0.0) / (10.0 * nuclear**2 + square))
        for name, m in self.m.items():
            if name in self.decayed:
                self.w[name] *= 1 - self.lr * 0.1
            if name in self.matrices:
                self.w[name] -= self.rate * 10.0 * nuclear * polar(m)
            else:
                self.w[name] -= self.rate * m / (np.sqrt(self.v[name]) + 1e-8)


@pytest.mark.parametrize(("lr", "bound"), [(1e-3, 0.0), (10.0, 0.0), (10.0, 1.9)])
def test_muonmax_momo_follows_its_twin_where_the_rate_is_the_given_one_and_where_the_loss_bounds_it(rivals, lr, bound):
    model = network()
    optimizer = rivals.MuonMaxMomo(groups_of(model), lr=lr, lower_bound=bound, polar="svd")
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    decayed = {name for name in weights if name.endswith("weight")}
    twin = MomoTwin(weights, {"1.weight", "3.weight"}, decayed, lr, bound)
    bounded = 0
    for step in range(STEPS):
        model.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        optimizer.step(lambda loss=loss: loss)
        twin.step(loss.item(), gradients)
        bounded += twin.rate < lr
        for name, p in model.named_parameters():
            # float64 throughout; a step divides by sqrt(v), which can be 1e-8
            np.testing.assert_allclose(p.detach().numpy(), twin.w[name], rtol=1e-9, atol=1e-9)
    assert bounded == (0 if lr < 1 else STEPS)
