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


def test_the_frame_on_adamuon_is_adamuon_with_a_beta_that_warms_up_beside_our_adamw(rivals):
    import pytorch_optimizer

    ours, matrices, rest = network(), network(), network()
    optimizer = rivals.FramedAdaMuon(lw.param_groups(ours, torch.arange(5)), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    ada_muon = pytorch_optimizer.AdaMuon([{"params": [matrices[1].weight, matrices[3].weight], "use_muon": True}])
    frame = lw.DualMuon(lw.param_groups(rest, torch.arange(5)), head=1.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(ours, step).backward()
        for twin in (matrices, rest):  # the same weights and gradients, each optimizer's part of the step
            for p, q in zip(twin.parameters(), ours.parameters(), strict=True):
                p.data, p.grad = q.data.clone(), q.grad.clone()
        window = 1.0 + (step + 1) / 200 * 0.95 / (1.0 - 0.95)  # of 20 gradients after 200 steps
        ada_muon.param_groups[0].update(lr=LR * 0.5**step, betas=(1.0 - 1.0 / window, 0.95), weight_decay=0.1)
        for group in frame.param_groups:
            group["lr"] = LR * 0.5**step
        for each in (optimizer, ada_muon, frame):
            each.step()
        schedule.step()
        for i in (1, 3):
            torch.testing.assert_close(ours[i].weight, matrices[i].weight, rtol=0, atol=0)
        for name in ("0.weight", "1.bias", "3.bias", "4.weight", "4.bias"):
            torch.testing.assert_close(ours.get_parameter(name), rest.get_parameter(name), rtol=0, atol=0)


def test_adam_mini_has_a_second_average_for_each_head_or_tensor_and_takes_rates_and_decay_by_group(rivals):
    names = {"embed": 1, "q_proj": 2, "o_proj": 3, "bias": 4}
    widths = {"embed": (5, 128), "q_proj": (128, 128), "o_proj": (128, 128), "bias": (128,)}
    params = {f"{name}.weight": nn.Parameter(torch.ones(widths[name])) for name in names}
    groups = [{"params": [item], "lr": 0.01 * n} for item, n in zip(params.items(), names.values(), strict=True)]
    groups[-1]["weight_decay"] = 0.0
    optimizer = rivals.adam_mini(groups)
    torch.manual_seed(0)
    for p in params.values():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        *((0.01 * n, 0.1) for n in (1, 2, 3)),
        (0.04, 0.0),
    ]
    embed, query, output, bias = (optimizer.state[p] for p in params.values())
    assert embed["v"].shape == (5, 128)
    assert query["v_mean"].shape == (4,)
    assert output["v_mean"].shape == bias["v_mean"].shape == ()
    own = params["q_proj.weight"].grad.view(4, 32, 128).square().mean((1, 2))  # 32 rows of a head
    torch.testing.assert_close(query["v_mean"], 0.001 * own)


@pytest.mark.parametrize("name", ["lamb", "prodigy", "soap"])
def test_other_rivals_take_rates_and_decay_by_group(rivals, name):
    groups = lw.param_groups(network(), torch.arange(5))
    for group in groups:
        group["lr"] = 0.5 if group["role"] == "head" else 0.25
    optimizer = getattr(rivals, name)(groups, lr=LR)
    found = {len(group["params"]): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    wanted = {len(group["params"]): (group["lr"], 0.0 if group["role"] == "vector" else 0.1) for group in groups}
    assert len(optimizer.param_groups) == len(groups)
    assert found == wanted
