"""Bad input: one clear line that names the thing, its value and the mend, and nothing changed."""

import math
import warnings

import pytest
import torch
from tiny import assert_same_bits, make, net, set_gradients, take_step, tensors
from torch import nn

import layerwise as lw
from layerwise.geometry import Sign


def groups():
    return lw.param_groups(net())


def with_option(**options):
    found = groups()
    found[0] |= options
    return found


BAD = {
    "radius for all roles": (lambda: lw.Scion(groups(), radius=50), ["radius=50", "by role"]),
    "multipliers without names": (lambda: lw.StaticRates(0.5), ["0.5", "by unit name"]),
    "a preset's own name": (lambda: lw.Muon(groups(), adamw_lr=-1.0), ["adamw_lr=-1.0", "at least 0"]),
    "negative lr": (lambda: lw.Muon(groups(), lr=-1.0), ["lr=-1.0", "at least 0"]),
    "overridden lr": (
        lambda: lw.Muon(lw.param_groups(net(), {"up.weight": {"lr": -1.0}})),
        ["'up.weight'", "lr=-1.0"],
    ),
    "lr beyond float32": (lambda: lw.DMuon(groups(), lr=1e300), ["lr=1e+300", "at most 1e+30"]),
    "head beyond float32": (lambda: lw.DualMuon(groups(), head=1e300), ["head=1e+300", "at most 1e+30"]),
    "nan lr": (lambda: lw.DMuon(groups(), lr=math.nan), ["lr=nan", "finite"]),
    "infinite lr": (lambda: lw.Scion(groups(), lr=math.inf), ["lr=inf", "finite"]),
    "text lr": (lambda: lw.Lanton(groups(), lr="1e-3"), ["lr='1e-3'", "number"]),
    "bool lr": (lambda: lw.Signum(groups(), lr=True), ["lr=True", "number"]),
    "lr of two": (lambda: lw.Lanton(groups(), lr=torch.ones(2)), ["lr=tensor", "holding one"]),
    "integer tensor lr": (lambda: lw.Lanton(groups(), lr=torch.tensor(1)), ["lr=tensor(1)", "floating"]),
    "nan tensor lr": (lambda: lw.Lanton(groups(), lr=torch.tensor(math.nan)), ["lr=tensor(nan)", "finite"]),
    "adamw lr": (lambda: lw.Muon(groups(), adamw_lr=-3.0), ["lr=-3.0"]),
    "momentum of one": (lambda: lw.Muon(groups(), momentum=1.0), ["momentum=1.0", "not including, 1"]),
    "momentum tensor": (lambda: lw.Muon(groups(), momentum=torch.tensor(0.9)), ["momentum=tensor"]),
    "nan decay": (lambda: lw.DMuon(groups(), weight_decay=math.nan), ["weight_decay=nan", "finite"]),
    "tensor decay": (lambda: lw.DMuon(groups(), weight_decay=torch.tensor(0.1)), ["weight_decay=tensor"]),
    "betas": (lambda: lw.Muon(groups(), adamw_betas=(0.9, 1.0)), ["betas=(0.9, 1.0)", "[0, 1)"]),
    "one beta": (lambda: lw.Muon(groups(), adamw_betas=0.9), ["betas=0.9", "two numbers"]),
    "eps": (lambda: lw.Muon(groups(), adamw_eps=-1.0), ["eps=-1.0"]),
    "nesterov": (lambda: lw.Muon(groups(), nesterov=2), ["nesterov=2", "True or False"]),
    "unknown key": (lambda: lw.Lanton(with_option(momentun=0.9)), ["'momentun'", "0.9", "mean 'momentum'"]),
    "far from any": (lambda: lw.LayerwiseOptimizer(groups(), xyzzy=1), ["'xyzzy'", "weight_decay"]),
    "another library's name": (
        lambda: lw.Lanton(with_option(learning_rate=0.1)),
        ["'learning_rate'", "mean 'lr'"],
    ),
    "what rates= was called once": (lambda: lw.Lanton(groups(), noise=None), ["noise=None", "mean 'rates'"]),
    "the same in a group": (lambda: lw.Lanton(with_option(noise=None)), ["'noise'", "mean 'rates'"]),
    "what torch has and this has not": (lambda: lw.Muon(with_option(maximize=True)), ["'maximize'", "True"]),
    "in a recipe": (lambda: lw.LayerwiseOptimizer(groups(), {"default": {"tag": 1}}), ["'tag'"]),
    "negative lr_scale": (lambda: lw.Lanton(with_option(lr_scale=-1.0)), ["lr_scale=-1.0", "at least 0"]),
    "unknown default": (lambda: lw.LayerwiseOptimizer(groups(), weightdecay=1), ["mean 'weight_decay'"]),
    "geometry": (lambda: lw.Lanton(with_option(geometry="spectral")), ["geometry='spectral'", "Spectral()"]),
    "layout": (lambda: lw.Lanton(with_option(layout="out,in")), ["layout='out,in'", "param_groups"]),
    "rates": (lambda: lw.Lanton(groups(), rates=True), ["rates=True", "DualNormAdaptive()"]),
    "update": (lambda: lw.Lanton(with_option(update="sgd")), ["update='sgd'", "'lmo', 'adamw'"]),
    "scaling": (lambda: lw.Lanton(groups(), scaling="muon"), ["scaling='muon'", "'floored'"]),
    "scaling that does not fit": (
        lambda: lw.Lanton(groups(), scaling="floored"),
        ["'embed.weight'", "'floored'", "spectral", "Sign", "'unit'"],
    ),
    "overridden geometry of muon": (
        lambda: lw.Muon(lw.param_groups(net(), overrides={"up.weight": Sign()})),
        ["'up.weight'", "'floored'", "Sign", "'rms_0.2'"],
    ),
    "radius": (lambda: lw.Scion(groups(), radius={"hidden": -1.0}), ["radius=-1.0"]),
    "radius of no role": (lambda: lw.Scion(groups(), radius={"hiden": 1.0}), ["'hiden'", "hidden"]),
    "policy": (lambda: lw.Lanton(groups(), nonfinite="ignore"), ["'ignore'", "'raise', 'skip'"]),
    "norm_group": (lambda: lw.Lanton(with_option(norm_group=3)), ["norm_group=3"]),
    "alpha": (lambda: lw.NoiseAdaptive(alpha=-1.0), ["alpha=-1.0", "[0,"]),
    "alpha lost in float32": (lambda: lw.NoiseAdaptive(alpha=1e-30), ["1e-30", "give 0"]),
    "nan beta": (lambda: lw.NoiseAdaptive(beta=math.nan), ["beta=nan", "[0, 1)"]),
    "floor of zero": (lambda: lw.NoiseAdaptive(floor=0.0), ["floor=0.0"]),
    "reference": (lambda: lw.NoiseAdaptive(reference="prev"), ["'prev'", "'previous'", "'independent'"]),
    "anchor": (lambda: lw.NoiseAdaptive(anchor="min"), ["'min'", "'max' or 'mean'"]),
    "unknown noise option": (lambda: lw.NoiseAdaptive(gamma=1), ["gamma"]),
    "momentum reference without momentum": (
        lambda: lw.Lanton(groups(), momentum=0.0, rates=lw.NoiseAdaptive(reference="momentum")),
        ["'momentum'", "momentum=0", "'previous'"],
    ),
    "a word as a flag": (
        lambda: lw.NoiseAdaptive(size_normalised="no"),
        ["size_normalised='no'", "True or False"],
    ),
    "a number as a flag": (lambda: lw.Sign(per_input=1), ["per_input=1", "True or False"]),
    "a flag as a number": (lambda: lw.Spectral(taps=True), ["taps=True"]),
    "namo": (lambda: lw.NormAdaptive(beta2=1.0), ["beta2=1.0"]),
    "static value": (lambda: lw.StaticRates({"up.weight": -1.0}), ["'up.weight'", "-1.0"]),
    "static nan": (lambda: lw.StaticRates({"up.weight": math.nan}), ["nan"]),
    "static name": (
        lambda: lw.Lanton(groups(), rates=lw.StaticRates({"up.wieght": 0.5})),
        ["'up.wieght'", "0.5", "mean 'up.weight'"],
    ),
    "static on adamw": (
        lambda: lw.DMuon(groups(), rates=lw.StaticRates({"head.weight": 0.5})),
        ["'head.weight'", "0.5", "leave it out"],
    ),
    "complex": (
        lambda: lw.Lanton([nn.Parameter(torch.ones(2, 2, dtype=torch.cfloat))]),
        ["param_0", "complex"],
    ),
    "integer": (
        lambda: lw.Lanton([("ids", nn.Parameter(torch.ones(2, 2).int(), requires_grad=False))]),
        ["ids", "int32", "requires_grad=False"],
    ),
    "empty": (lambda: lw.Lanton([]), ["no parameters", "param_groups"]),
    "no groups": (lambda: lw.Lanton([]), ["no parameters"]),
    "single tensor": (lambda: lw.Lanton(nn.Parameter(torch.ones(2))), ["single tensor", "list"]),
    "the model itself": (lambda: lw.Lanton(net()), ["Net", "param_groups"]),
    "not a tensor": (lambda: lw.Lanton(["up.weight"]), ["'up.weight'", "tensor"]),
    "not a leaf": (lambda: lw.Lanton([nn.Parameter(torch.ones(2, 2)) * 2]), ["computation", "MulBackward"]),
    "mixed": (lambda: lw.Lanton([{"params": []}, nn.Parameter(torch.ones(2))]), ["mixes"]),
    "without params": (lambda: lw.Lanton([*groups(), {"lr": 1.0}]), ["no 'params'", "'lr'"]),
    "a set": (lambda: lw.Lanton([{"params": set(net().parameters())}]), ["set", "list"]),
    "geometry without layout": (
        lambda: lw.Lanton([{"params": [nn.Parameter(torch.ones(2))], "layout": groups()[0]["layout"]}]),
        ["layout=", "geometry=None"],
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore:parameters are grouped by shape")
def test_each_bad_value_is_named_with_its_mend(case):
    build, parts = BAD[case]
    with pytest.raises(lw.LayerwiseError) as error:
        build()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    for part in parts:
        assert part in message, message


def test_an_option_that_adamw_does_not_have_says_so():
    with pytest.warns(UserWarning, match=r"momentum=0.5 of the group of 'embed.weight' has no effect.*\"lmo\""):
        lw.Muon(lw.param_groups(net(), {"embed.weight": {"momentum": 0.5}}))


@pytest.mark.parametrize("preset", [lw.DualMuon, lw.Muon])
def test_a_geometry_that_adamw_does_not_step_in_says_so(preset):
    """A table given spectral steps went on with AdamW in silence; what no one asked for is not told of."""
    with pytest.warns(UserWarning, match=r"geometry=Spectral\(.*of the group of 'embed.weight' has no effect.*\"lmo\""):
        preset(lw.param_groups(net(), {"embed.weight": lw.Spectral()}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preset(lw.param_groups(net()))
        preset(lw.param_groups(net(), {"embed.weight": {"geometry": lw.Spectral(), "update": "lmo"}}))
        preset(lw.param_groups(net(), {"up.weight": {"update": "adamw"}}))


@pytest.mark.filterwarnings("ignore:parameters are grouped by shape")
def test_groups_as_torch_takes_them():
    """With generators, and with a group that is empty."""
    model = net()
    optimizer = lw.Lanton([{"params": model.up.parameters(), "lr": 0.5}, {"params": model.down.parameters()}])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    optimizer = lw.Lanton([*groups(), {**groups()[0], "params": [], "param_names": []}])
    set_gradients(model, 0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:parameters are grouped by shape")
def test_a_parameter_given_twice():
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(lw.LayerwiseError, match="twice"):
        lw.Lanton([p, p])
    with pytest.raises(lw.LayerwiseError, match="'param_1' is given twice"):
        lw.Lanton([{"params": [p]}, {"params": [p]}])
    with pytest.raises(lw.LayerwiseError, match="named 'a'"):
        lw.Lanton([("a", p), ("a", nn.Parameter(torch.ones(2)))])
    found = groups()
    with pytest.raises(lw.LayerwiseError, match=r"'embed.weight' is given twice"):
        lw.Lanton([*found, found[0]])


def test_a_sparse_gradient_names_the_parameter_and_changes_nothing():
    model = net()
    optimizer = make("lanton", model)
    set_gradients(model, 0)
    model.embed.weight.grad = model.embed.weight.grad.to_sparse()
    before = tensors(model, optimizer)
    with pytest.raises(lw.LayerwiseError, match=r"'embed.weight' is sparse.*sparse=False"):
        optimizer.step()
    assert_same_bits(before, tensors(model, optimizer))
    set_gradients(model, 0)
    optimizer.step()


def test_a_sparse_half_names_the_parameter_and_is_not_held():
    model = net()
    optimizer = make("lanton-independent", model)
    set_gradients(model, 0)
    model.embed.weight.grad = model.embed.weight.grad.to_sparse()
    with pytest.raises(lw.LayerwiseError, match=r"'embed.weight' is sparse.*sparse=False"):
        optimizer.hold_half()
    optimizer.zero_grad()
    take_step(optimizer, model, 1)


def test_independent_noise_without_halves_says_what_to_call():
    model = net()
    optimizer = make("lanton-independent", model)
    set_gradients(model, 0)
    before = tensors(model, optimizer)
    with pytest.raises(lw.LayerwiseError, match=r"hold_half\(\)"):
        optimizer.step()
    assert_same_bits(before, tensors(model, optimizer))
    take_step(optimizer, model, 1)


def test_a_half_noted_before_zero_grad_is_forgotten():
    model, other = net(), net()
    optimizers = [make("lanton-independent", m) for m in (model, other)]
    set_gradients(model, 50)
    optimizers[0].hold_half()  # a batch that was given up, as by a GradScaler that skips its step
    optimizers[0].zero_grad()
    for m, optimizer in zip((model, other), optimizers, strict=True):
        take_step(optimizer, m, 0)
    assert_same_bits(tensors(model, optimizers[0]), tensors(other, optimizers[1]))


def test_noting_both_halves_equals_noting_the_first():
    """Where gradients are clipped the second half is noted before; without clipping it makes no difference."""
    model, other = net(), net()
    optimizers = [make("lanton-independent", m) for m in (model, other)]
    for step in range(2):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            set_gradients(m, step + 100, scale=0.5)
            optimizer.hold_half()
            set_gradients(m, step)
            if m is other:
                optimizer.hold_half()
            optimizer.step()
    assert_same_bits(tensors(model, optimizers[0]), tensors(other, optimizers[1]))
