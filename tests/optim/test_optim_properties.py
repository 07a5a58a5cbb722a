"""Properties that hold for any model, any gradients and any order."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same_bits, net, set_gradients, tensors

import layerwise as lw

few = settings(max_examples=15)
rules = st.sampled_from(
    [
        None,
        lw.NoiseAdaptive(),
        lw.NoiseAdaptive(alpha=0.5, anchor="mean"),
        lw.NoiseAdaptive(reference="momentum", size_normalised=True),
        lw.NormAdaptive(),
        lw.DualNormAdaptive(),
    ]
)
presets = st.sampled_from([lw.Muon, lw.DMuon, lw.Scion, lw.Signum, lw.Lanton])


def train(optimizer, model, seed, scale=1.0, steps=4, skip=()):
    for step in range(steps):
        set_gradients(model, seed + step, scale, skip if step % 2 else ())
        optimizer.step()


@few
@given(preset=presets, rule=rules, order=st.permutations(range(8)), seed=st.integers(0, 10**6), data=st.data())
def test_neither_the_order_of_parameters_nor_their_grouping_matters(preset, rule, order, seed, data):
    model, other = net(torch.float64), net(torch.float64)
    singles = [
        {**group, "params": [pair]} for group in lw.param_groups(other) for pair in group["params"]
    ]  # every parameter alone
    assert len(singles) == 7
    singles = [singles[i] for i in order if i < 7]
    optimizers = preset(lw.param_groups(model), rates=rule), preset(singles, rates=rule)
    skip = data.draw(st.sets(st.sampled_from([n for n, _ in model.named_parameters()]), max_size=3))
    for m, optimizer in zip((model, other), optimizers, strict=True):
        train(optimizer, m, seed, skip=skip)
    for (n, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        # sums over a group are taken in another order, in float32: rates differ by some 1e-7 of themselves, and no
        # step here is longer than 3000 * 2^-12
        torch.testing.assert_close(a, b, rtol=0, atol=4 * 1e-6, msg=lambda m, n=n: f"{n}: {m}")
    rates, others = (optimizer.layer_rates() for optimizer in optimizers)
    for unit, rate in rates.items():
        assert math.isclose(rate.multiplier, others[unit].multiplier, rel_tol=1e-5)


@few
@given(
    preset=st.sampled_from([lw.Scion, lw.Signum, lw.Lanton]),
    rule=st.sampled_from(
        [
            None,
            lw.DualNormAdaptive(),
            *(
                lw.NoiseAdaptive(reference=reference, anchor=anchor)
                for reference in ("previous", "previous_bf16", "momentum")
                for anchor in ("max", "mean")
            ),
        ]
    ),
    power=st.integers(-40, 40),
    seed=st.integers(0, 10**6),
)
def test_the_scale_of_the_gradients_does_not_matter_at_alpha_zero(preset, rule, power, seed):
    """A power of two commutes with rounding, so that the weights agree in every bit."""
    model, other = net(), net()
    train(preset(lw.param_groups(model), rates=rule), model, seed)
    train(preset(lw.param_groups(other), rates=rule), other, seed, scale=2.0**power)
    for (n, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), n


@few
@given(preset=presets, names=st.sets(st.sampled_from(["up.weight", "down.weight"])), seed=st.integers(0, 10**6))
def test_static_multipliers_of_one_are_no_rule(preset, names, seed):
    model, other = net(), net()
    optimizers = (
        preset(lw.param_groups(model)) if preset is not lw.Lanton else preset(lw.param_groups(model), rates=None),
        preset(lw.param_groups(other), rates=lw.StaticRates(dict.fromkeys(names, 1.0))),
    )
    for m, optimizer in zip((model, other), optimizers, strict=True):
        train(optimizer, m, seed)
    kept = {k: v for k, v in tensors(other, optimizers[1]).items() if not k.endswith(".multiplier")}
    assert_same_bits(tensors(model, optimizers[0]), kept)


@few
@given(multiplier=st.floats(0, 8), seed=st.integers(0, 10**6))
def test_a_static_multiplier_multiplies_the_step_and_not_the_decay(multiplier, seed):
    model, other = net(torch.float64), net(torch.float64)
    rule = lw.StaticRates({"down.weight": multiplier})
    optimizers = lw.Lanton(lw.param_groups(model), rates=None), lw.Lanton(lw.param_groups(other), rates=rule)
    start = model.down.weight.detach().clone()
    for m, optimizer in zip((model, other), optimizers, strict=True):
        train(optimizer, m, seed, steps=1)
    decayed = start * (1 - 2e-3 * 0.1)
    torch.testing.assert_close(
        other.down.weight - decayed, multiplier * (model.down.weight - decayed), rtol=1e-6, atol=1e-15
    )
    assert torch.equal(other.up.weight, model.up.weight)
    assert math.isclose(optimizers[1].layer_rates()["down.weight"].lr, 2e-3 * multiplier, rel_tol=1e-6, abs_tol=1e-12)


@few
@given(
    seed=st.integers(0, 10**6),
    anchor=st.sampled_from(["max", "mean"]),
    alpha=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_noisier_is_slower_and_the_anchor_is_where_it_says(seed, anchor, alpha):
    model = net()
    optimizer = lw.Lanton(lw.param_groups(model), rates=lw.NoiseAdaptive(alpha=alpha, anchor=anchor))
    train(optimizer, model, seed)
    rates = optimizer.layer_rates()
    for group in (["up.weight", "down.weight"], ["up.bias", "norm.weight", "norm.bias"]):
        ranked = sorted((rates[n].squared_norm, rates[n].multiplier) for n in group)
        multipliers = [m for _, m in ranked]
        assert multipliers == sorted(multipliers, reverse=True)
        if anchor == "max":
            assert multipliers[0] == 1.0
        else:  # the mean of the squares is one: sqrt(a / mean a)
            assert math.isclose(sum(m**2 for m in multipliers) / len(multipliers), 1.0, rel_tol=1e-5)
    assert rates["embed.weight"].multiplier == 1.0  # alone in its norm group
