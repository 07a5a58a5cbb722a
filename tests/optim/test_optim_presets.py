"""Each preset against the optimizer it is named after, 20 steps on the same gradients, in float64.

In float64 both sides differ by rounding alone (2.2e-16). Newton-Schulz enlarges it: its polynomial has slope 3.44 at
zero, so five steps enlarge a difference along a small singular direction up to 3.44^5 = 485 times, and the momentum
feeds no difference back, as the gradients are given. 20 steps of entries below 1 then differ by less than
20 * 485 * 2.2e-16 * (a few roundings) < 1e-11.
"""

import functools
import math

import pytest
import torch
from tiny import net, set_gradients, twin

import layerwise as lw

STEPS = 20
CLOSE = {"rtol": 0, "atol": 1e-11}


def walk(ours, theirs, optimizer, *others):
    for step in range(STEPS):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        for other in others:
            other.step()


def assert_close(ours, theirs, **tolerance):
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def torch_muon_in_full_precision(monkeypatch):
    """torch.optim.Muon's own code with its cast to bfloat16 taken out."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


def split(model):
    matrices = [model.up.weight, model.down.weight]
    return matrices, [p for p in model.parameters() if all(p is not m for m in matrices)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("adjust", ["original", None])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.usefixtures("torch_muon_in_full_precision")
def test_muon_is_torchs(decay, adjust, nesterov):
    ours = net(torch.float64)
    theirs = twin(ours)
    matrices, rest = split(theirs)
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=decay, nesterov=nesterov, adjust_lr_fn=adjust)
    adamw = torch.optim.AdamW(rest, lr=3e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=decay)
    groups = lw.param_groups(ours, overrides={"role:vector": {"weight_decay": decay}})
    walk(ours, theirs, lw.Muon(groups, weight_decay=decay, nesterov=nesterov), muon, adamw)
    assert_close(ours, theirs, **CLOSE)
    for mine, other in zip(split(ours)[1], rest, strict=True):
        assert torch.equal(mine, other)  # AdamW's groups are torch's, bit for bit


@pytest.mark.usefixtures("torch_muon_in_full_precision")
def test_d_muon_is_torchs_match_rms_adamw():
    ours = net(torch.float64)
    theirs = twin(ours)
    matrices, rest = split(theirs)
    muon = torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    vectors = {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0}
    groups = [{"params": [p for p in rest if p.ndim > 1]}, vectors]
    adamw = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    walk(ours, theirs, lw.DMuon(lw.param_groups(ours), lr=2e-3), muon, adamw)
    assert_close(ours, theirs, **CLOSE)
    for mine, other in zip(split(ours)[1], rest, strict=True):
        assert torch.equal(mine, other)


def test_d_muon_is_moonlights():
    """As Moonlight writes it: `buf = 0.95 buf + G`, `u = G + 0.95 buf`, without the average's 1 - 0.95."""
    ours = net(torch.float64)
    weight = ours.up.weight.detach().clone()
    optimizer, buf = lw.DMuon(lw.param_groups(ours), lr=2e-3), torch.zeros_like(weight)
    for step in range(STEPS):
        set_gradients(ours, step)
        buf = 0.95 * buf + ours.up.weight.grad
        o = quintic(ours.up.weight.grad + 0.95 * buf)
        weight = weight * (1 - 2e-3 * 0.1) - 2e-3 * 0.2 * math.sqrt(10) * o
        optimizer.step()
    torch.testing.assert_close(ours.up.weight.detach(), weight, **CLOSE)


def test_torchs_muon_as_published_differs_by_its_bfloat16_alone():
    """What is left of the difference is torch's cast: our float32 is as far from it as exact arithmetic is."""
    models = {name: net(torch.float32) for name in ("ours", "published")} | {"exact": net(torch.float64)}
    models["exact"].load_state_dict(models["ours"].state_dict())
    start = twin(models["ours"])
    optimizers = {name: lw.DMuon(lw.param_groups(m), lr=0.02) for name, m in models.items()}
    published = split(models["published"])[0]
    optimizers["published"] = torch.optim.Muon(published, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(STEPS):
        for name, model in models.items():
            set_gradients(model, step)
            optimizers[name].step()
    for i in range(2):
        ours, torchs, exact = (split(models[name])[0][i].double() for name in ("ours", "published", "exact"))
        way = (exact - split(start)[0][i].double()).norm().item()
        of_torch = (torchs - exact).norm().item() / way
        assert of_torch < 0.05  # bfloat16's eps of 0.8 %, enlarged by Newton-Schulz, averaged over the steps
        # float32's eps of 1.2e-7, times 485 for Newton-Schulz, and some for the sums
        assert (ours - exact).norm().item() / way < 2e-4
        assert (ours - torchs).norm().item() / way == pytest.approx(of_torch, abs=2e-4)


@pytest.mark.parametrize("constrained", [False, True])
def test_scion_is_pytorch_optimizers(constrained, monkeypatch):
    from pytorch_optimizer.optimizer import scion as module

    exact = functools.partial(module.zero_power_via_newton_schulz_5, dtype=torch.float64)
    monkeypatch.setattr(module, "zero_power_via_newton_schulz_5", exact)
    ours = net(torch.float64)
    theirs = twin(ours)
    matrices, _ = split(theirs)
    norm = module.LMONorm
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    reference = module.SCION(
        [
            {"params": matrices, "norm_type": norm.SPECTRAL, "scale": 50.0},
            {"params": [theirs.head.weight], "norm_type": norm.SIGN, "scale": 3000.0},
            {
                "params": [theirs.embed.weight],
                "norm_type": norm.SIGN,
                "norm_kwargs": {"normalize": False},
                "scale": 1.0,
            },
            {"params": vectors, "norm_type": norm.BIAS, "scale": 1.0},
        ],
        lr=2**-12,
        momentum=0.1,
        constraint=constrained,
    )
    groups = lw.param_groups(ours, overrides={"role:vector": {"weight_decay": float(constrained)}})
    walk(ours, theirs, lw.Scion(groups, weight_decay=float(constrained)), reference)
    # BiasRMS there divides by RMS + 1e-8, which is a relative 1e-8 of steps of lr a step
    assert_close(ours, theirs, rtol=0, atol=1e-11 + STEPS * 2**-12 * 3 * 1e-7)
    for a, b in zip([*split(ours)[0], ours.head.weight], [*matrices, theirs.head.weight], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=50 * 1e-11)


def test_scions_constrained_form_keeps_every_norm_within_its_radius():
    model = net(torch.float64)
    groups = lw.param_groups(model, overrides={"role:vector": {"weight_decay": 1.0}})
    optimizer = lw.Scion(groups, lr=0.1, weight_decay=1.0, radius={"hidden": 2.0, "head": 5.0})
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                for stack in group["layout"].to_matrices(p):
                    p.mul_(group["radius"] / group["geometry"].norm(stack).max().clamp(min=1e-9))
    for step in range(STEPS):
        set_gradients(model, step)
        optimizer.step()
        for group in optimizer.param_groups:
            for p in group["params"]:
                for stack in group["layout"].to_matrices(p):
                    # the quintic's unit steps have a norm of up to 1.21
                    assert group["geometry"].norm(stack).max() <= 1.21 * group["radius"] * (1 + 1e-12)


def test_signum_is_the_sign_of_the_average():
    model = net(torch.float64)
    weights = [p.detach().clone() for p in model.parameters()]
    averages = [torch.zeros_like(w) for w in weights]
    optimizer = lw.Signum(lw.param_groups(model), lr=1e-2, momentum=0.8, weight_decay=0.1)
    for step in range(STEPS):
        set_gradients(model, step)
        optimizer.step()
        for w, m, p in zip(weights, averages, model.parameters(), strict=True):
            m.mul_(0.8).add_(p.grad, alpha=0.2)
            w.sub_(1e-2 * (0.1 if p.ndim > 1 else 0.0) * w).sub_(1e-2 * m.sign())
    for w, p in zip(weights, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-14)


def quintic(m):
    x = m / m.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_namo_is_the_papers_scalar_on_d_muon():
    """`v = 0.99 v + 0.01 |G|_F^2`; times `sqrt(1 - 0.99^t) / (1 - 0.95^t) |M|_F / (sqrt(v) + eps)`, at most 1."""
    model = net(torch.float64)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 2}
    weights = {name: w for name, w in weights.items() if name in ("up.weight", "down.weight")}
    averages = {name: torch.zeros_like(w) for name, w in weights.items()}
    moments = dict.fromkeys(weights, 0.0)
    optimizer = lw.DMuon(lw.param_groups(model), lr=1e-2, rates=lw.NormAdaptive())
    seen = []
    for t in range(1, STEPS + 1):
        set_gradients(model, t)
        optimizer.step()
        rates = optimizer.layer_rates()
        for name, w in weights.items():
            g = model.get_parameter(name).grad
            m = averages[name].mul_(0.95).add_(g, alpha=0.05)
            u = 0.95 * m + 0.05 * g
            moments[name] = 0.99 * moments[name] + 0.01 * g.square().sum().item()
            ratio = math.sqrt(1 - 0.99**t) / (1 - 0.95**t) * u.norm().item() / (moments[name] ** 0.5 + 1e-8)
            multiplier = min(1.0, ratio)
            seen.append(multiplier)
            assert rates[name].multiplier == pytest.approx(multiplier, rel=1e-5)  # powers and roots in float32
            w.mul_(1 - 1e-2 * 0.1).sub_(1e-2 * multiplier * 0.2 * math.sqrt(10) * quintic(u))
    assert min(seen) < 0.9
    for name, w in weights.items():
        # entries of a step are at most lr * factor, each off by 1e-5 of it
        p = model.get_parameter(name).detach()
        torch.testing.assert_close(p, w, rtol=0, atol=STEPS * 1e-2 * 0.64 * 1e-5)


def test_muon_keeps_adamw_out_of_the_rates_of_a_rule():
    model = net()
    optimizer = lw.Muon(lw.param_groups(model), rates=lw.NoiseAdaptive())
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    rates = optimizer.layer_rates()
    assert {name for name, rate in rates.items() if not math.isnan(rate.squared_norm)} == {
        "up.weight",
        "down.weight",
    }
    assert rates["embed.weight"] == (pytest.approx(math.nan, nan_ok=True), 1.0, 3e-4)
    assert min(rates["up.weight"].multiplier, rates["down.weight"].multiplier) < 1


def test_a_convolution_is_stepped_as_its_flattened_matrix():
    """Jordan's Muon flattens [out, in, kh, kw] to [out, in kh kw] and scales by that matrix's shape."""
    torch.manual_seed(0)
    conv = torch.nn.Sequential(torch.nn.Conv2d(3, 40, (2, 3)), torch.nn.Flatten(), torch.nn.Linear(40, 2)).double()
    weight = conv[0].weight.detach().clone()
    optimizer = lw.Muon(lw.param_groups(conv), lr=0.02)
    set_gradients(conv, 0)
    optimizer.step()
    u = 0.95 * 0.05 * conv[0].weight.grad + 0.05 * conv[0].weight.grad
    step = 0.02 * math.sqrt(40 / 18) * quintic(u.flatten(1)).view_as(weight)
    torch.testing.assert_close(conv[0].weight.detach(), weight - step, rtol=0, atol=1e-12)
