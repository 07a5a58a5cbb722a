"""Rates from the direction's own dual norm: against a literal twin in every geometry, and what the group's median is for."""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import net, set_gradients
from torch import nn

import layerwise as lw
from layerwise.geometry import ColNorm, Frobenius, RowNorm, Sign, Spectral, VectorRMS
from layerwise.optim.rules.rule import weighted_median
from layerwise.optim.work.local import DOT_FROM, inner_products

GEOMETRIES = {
    "spectral": Spectral(polar="svd"),
    "conv": Spectral(polar="svd", taps=3),
    "sign": Sign(),
    "sign_per_input": Sign(per_input=True),
    "row": RowNorm(),
    "column": ColNorm(),
    "frobenius": Frobenius(),
    "vector": VectorRMS(),
}
SHAPES = {"tall": (8, 3), "wide": (3, 9), "square": (6, 6), "large": (7, 6)}
STEPS, LR = 12, 0.01
#: H and the multipliers are kept in float32: a square, and a moving average of 12 terms.
RELATIVE = 10 * torch.finfo(torch.float32).eps


def gradients(generator):
    """Of sizes that lie some hundredfold apart."""
    return {
        name: 10.0 ** (i - 1) * torch.randn(shape, generator=generator, dtype=torch.float64)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def make(weights, geometry, **options):
    group = {
        "params": list(weights.items()),
        "layout": lw.param_groups(nn.Linear(3, 3, bias=False))[0]["layout"],
        "geometry": geometry,
    }
    return lw.LayerwiseOptimizer([group], lr=LR, **options)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("nesterov", "every"), [(False, 1), (True, 1), (True, 3)])
def test_rates_and_weights_follow_the_twin_in_every_geometry(geometry, nesterov, every):
    generator = torch.Generator().manual_seed(0)
    weights = {name: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    rule = lw.DualNormAdaptive(softening=0.2, beta=0.8, every=every)
    optimizer = make(weights, GEOMETRIES[geometry], rates=rule, momentum=0.9, nesterov=nesterov)
    twin = oracle.DualNormRates(
        {name: w.detach().numpy() for name, w in weights.items()},
        geometry,
        lr=LR,
        momentum=0.9,
        nesterov=nesterov,
        softening=0.2,
        beta=0.8,
        every=every,
    )
    chance = np.random.default_rng(0)
    for step in range(STEPS):
        given_now = {n: g for n, g in gradients(generator).items() if step == 0 or chance.random() < 0.8}
        for name, w in weights.items():
            w.grad = given_now.get(name)
        optimizer.step()
        twin.step({name: g.numpy() for name, g in given_now.items()})
        for name, rate in optimizer.layer_rates().items():
            assert rate.squared_norm == pytest.approx(twin.h[name], rel=RELATIVE), (step, name)
            assert rate.multiplier == pytest.approx(twin.multiplier[name], rel=RELATIVE), (step, name)
            # No entry of a unit step is larger than sqrt(42), the largest matrix's column or vector length.
            tolerance = STEPS * LR * math.sqrt(42) * RELATIVE
            np.testing.assert_allclose(weights[name].detach().numpy(), twin.w[name], rtol=0, atol=tolerance)
    multipliers = [rate.multiplier for rate in optimizer.layer_rates().values()]
    assert max(multipliers) > 1.1 > 0.9 > min(multipliers)  # there was something to follow


def test_the_step_that_measures_is_not_yet_changed_by_what_it_measures():
    model, other = net(), net()
    ruled = lw.DualMuon(lw.param_groups(model))
    plain = lw.DualMuon(lw.param_groups(other), rates=None)
    for optimizer, m in ((ruled, model), (plain, other)):
        set_gradients(m, 0)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert {r.multiplier for r in ruled.layer_rates().values()} != {1.0}


def test_only_every_fourth_step_is_measured_on_the_way_of_a_checkpoint_too():
    """A run stopped after six steps measures next at its eighth, as it would have."""
    model = net()
    optimizer = lw.DualMuon(lw.param_groups(model))
    seen = []
    for step in range(10):
        if step == 6:
            saved = optimizer.state_dict()
            optimizer = lw.DualMuon(lw.param_groups(model))
            optimizer.load_state_dict(saved)
        set_gradients(model, step)
        optimizer.step()
        seen.append([rate.multiplier for rate in optimizer.layer_rates().values()])
    changed = [step for step in range(1, 10) if seen[step] != seen[step - 1]]
    assert changed == [4, 8]


def test_a_checkpoint_of_before_goes_on_with_the_rule_of_before():
    """It says nothing of `every`, which was 1."""
    before = lw.DualNormAdaptive(beta=0.95, every=1)
    made = lw.DualMuon(lw.param_groups(net()), rates=before)
    saved = made.state_dict()
    for group in saved["param_groups"]:
        group["rates"] = group["rates"].replace(", every=1", "")
    lw.DualMuon(lw.param_groups(net()), rates=before).load_state_dict(saved)
    with pytest.raises(lw.LayerwiseError, match=r"beta=0\.95, every=1\) in it and DualNormAdaptive\(.*every=4\)"):
        lw.DualMuon(lw.param_groups(net())).load_state_dict(saved)


@pytest.mark.parametrize("shape", [(3, 120, 130), (3, 140, 150), (3, 20, 30)])
def test_inner_products_are_taken_as_matrices_lie(shape):
    """Sizes to both sides of where the library's are taken. A copy that turns matrices round would sum in another order."""
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = inner_products(a, b)
    # sums of 600 to 21,000 products of order one: their rounding, 2^-24 of a partial sum each
    torch.testing.assert_close(found.double(), (a.double() * b.double()).sum((1, 2)), rtol=0, atol=1e-3)
    assert torch.equal(inner_products(a.mT, b.mT), found) or a[0].numel() < DOT_FROM
    torch.testing.assert_close(inner_products(a.mT, b.mT.contiguous()), found, rtol=0, atol=1e-3)
    torch.testing.assert_close(inner_products(a.mT.contiguous(), b.mT), found, rtol=0, atol=1e-3)


@settings(max_examples=50)
@given(
    values=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=12),
    weights=st.lists(st.integers(0, 5), min_size=12, max_size=12),
)
def test_the_weighted_median_is_that_of_every_value_repeated_by_its_weight(values, weights):
    weights = weights[: len(values)]
    repeated = sorted(v for v, k in zip(values, weights, strict=True) for _ in range(k))
    found = weighted_median(torch.tensor(values), torch.tensor(weights, dtype=torch.float32))
    assert found.item() == (repeated[(len(repeated) - 1) // 2] if repeated else min(values))


def depthwise(channels):
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 48, bias=False), nn.Linear(48, 16, bias=False))
    if channels:
        model.append(nn.Conv1d(channels, channels, 4, groups=channels, bias=False))
    return model


@pytest.mark.parametrize("preset", [lw.DMuon, lw.Scion])
def test_thousands_of_tiny_units_do_not_set_the_rates_of_matrices(preset):
    """shared/cases/06: with 256 channels of four taps beside them."""
    rates = []
    for channels in (0, 256):
        model = depthwise(channels)
        groups = lw.param_groups(model, {"2.weight": {"role": "hidden"}})
        optimizer = preset(groups, rates=lw.DualNormAdaptive())
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            for p in model.parameters():
                size = 10.0 if p.ndim == 3 else 1.0
                p.grad = size * torch.randn(p.shape, generator=generator)
            optimizer.step()
        rates.append([optimizer.layer_rates()[f"{i}.weight"].multiplier for i in range(3)])
    # 1024 entries of 2816: the median moves from one matrix to the next, of nearly the same norm
    assert rates[1] == pytest.approx(rates[0], rel=0.05)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(12, 12, bias=False)
        self.num_experts = 6
        self.experts = nn.Parameter(torch.randn(6, 12, 12) / 4)


def test_a_unit_without_a_signal_neither_counts_nor_is_slowed():
    """shared/cases/07: experts that no token reaches."""
    rates = []
    for dead in (0, 5):
        torch.manual_seed(0)
        model = Experts()
        groups = lw.param_groups(model, {"experts": {"role": "experts"}, "dense.weight": {"role": "hidden"}})
        optimizer = lw.DMuon(groups, rates=lw.DualNormAdaptive())
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            model.experts.grad[:dead] = 0.0
            optimizer.step()
        rates.append(optimizer.layer_rates())
    assert rates[1]["dense.weight"].multiplier == pytest.approx(rates[0]["dense.weight"].multiplier, rel=0.05)
    assert rates[1]["experts[0]"].multiplier == 1.0
    assert math.isnan(rates[1]["experts[0]"].squared_norm)


def test_options_out_of_range_are_refused():
    with pytest.raises(lw.LayerwiseError, match=r"DualNormAdaptive\(softening=0\.0\)"):
        lw.DualNormAdaptive(softening=0.0)
    with pytest.raises(lw.LayerwiseError, match=r"DualNormAdaptive\(beta=1\.0\)"):
        lw.DualNormAdaptive(beta=1.0)
    with pytest.raises(lw.LayerwiseError, match=r"DualNormAdaptive\(every=0\): give a whole number from 1 up"):
        lw.DualNormAdaptive(every=0)
