"""What training scripts write into groups: a rate's scale, keys of their own, no parameters at all."""

import copy
import warnings

import pytest
import torch
from tiny import OPTIMIZERS, assert_same_bits, make, net, take_step, tensors, twin

import layerwise as lw

SCALES = {"embed.weight": 0.5, "up.weight": 0.25, "norm.*": 2.0, "down.weight": 0.0}
EXACT = {"lr_scale": 0.5}  # a power of two: times a rate without rounding


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scale_is_the_same_as_that_rate_in_the_group_bit_for_bit(name):
    scaled, plain = net(), net()
    one = OPTIMIZERS[name](lw.param_groups(scaled, {"*": EXACT}), weight_decay=0.1)
    other = make(name, plain, weight_decay=0.1)
    for group in other.param_groups:
        group["lr"] *= 0.5
    for step in range(3):
        take_step(one, scaled, step)
        take_step(other, plain, step)
    assert_same_bits(tensors(scaled, one), tensors(plain, other))
    assert str(one.layer_rates()) == str(other.layer_rates())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scale_of_one_changes_no_bit(name):
    scaled, plain = net(), net()
    one = OPTIMIZERS[name](lw.param_groups(scaled, {"*": {"lr_scale": 1.0}}))
    other = make(name, plain)
    for step in range(3):
        take_step(one, scaled, step)
        take_step(other, plain, step)
    assert_same_bits(tensors(scaled, one), tensors(plain, other))


@pytest.mark.parametrize("preset", [lw.Muon, lw.Scion])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_scales_survive_a_loop_that_writes_one_rate_into_all_groups(preset, as_tensor):
    model = net()
    optimizer = preset(lw.param_groups(model, {key: {"lr_scale": value} for key, value in SCALES.items()}))
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0625) if as_tensor else 0.0625
    rates = {name: rate.lr for name, rate in optimizer.layer_rates().items()}
    assert (rates["embed.weight"], rates["up.weight"], rates["norm.bias"]) == (0.03125, 0.015625, 0.125)
    assert (rates["down.weight"], rates["head.weight"]) == (0.0, 0.0625)
    kept = model.down.weight.detach().clone()
    take_step(optimizer, model, 0)
    assert torch.equal(model.down.weight, kept)
    assert not torch.equal(model.head.weight, net().head.weight)


def moved_by(optimizer, model):
    """The largest change of an entry in one step of AdamW from fresh moments: the rate itself, but for eps."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    take_step(optimizer, model, 0)
    return {name: float((parameter.detach() - before[name]).abs().max()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("given", "factor"), [({}, 3.0), ({"lr_scale": 0.5}, 1.5), ({"lr": 1.0}, 1.0)])
def test_a_loop_that_writes_one_rate_into_all_groups_leaves_dual_muons_head_its_factor(given, factor):
    """As nanoGPT's loop does. A scale of one's own multiplies the factor, a rate of one's own stands in its place."""
    model = net()
    optimizer = lw.DualMuon(lw.param_groups(model, {"role:head": given}), lr=1.0, weight_decay=0.0, adamw_nu=1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    moved = moved_by(optimizer, model)
    assert moved["head.weight"] == pytest.approx(factor * 0.01, rel=1e-4)
    assert moved["embed.weight"] == pytest.approx(0.01, rel=1e-4)


def test_a_checkpoint_whose_rate_has_dual_muons_factor_inside_keeps_that_rate():
    """As 0.1.0 wrote it: the head's own `lr` was twice the others', and there was no scale."""
    state = lw.DualMuon(lw.param_groups(net()), lr=0.01).state_dict()
    (head,) = (group for group in state["param_groups"] if group.pop("lr_scale", None))
    head["lr"] = 0.02
    optimizer = lw.DualMuon(lw.param_groups(net()), lr=1.0)
    optimizer.load_state_dict(state)
    rates = optimizer.layer_rates()
    assert (rates["head.weight"].lr, rates["embed.weight"].lr) == (0.02, 0.01)


def test_rates_that_hold_their_scale_already_are_warned_of_once():
    """timm's schedulers write `lr * lr_scale`."""
    model = net()
    optimizer = lw.Lanton(lw.param_groups(model, {"up.weight": {"lr_scale": 0.3}, "head.weight": {"lr_scale": 0.7}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_step(optimizer, model, 0)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group.get("lr_scale", 1.0)
    with pytest.warns(UserWarning, match="no lr_scale"):
        take_step(optimizer, model, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_step(optimizer, model, 2)


ONE_RATE = {
    "nanoGPT's loop": lambda o: [group.update(lr=1e-3) for group in o.param_groups],
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=10),
    "a list for OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [g["lr"] for g in o.param_groups], 10),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.1),
}


@pytest.mark.parametrize("name", ONE_RATE)
def test_one_rate_written_into_groups_of_several_is_told_at_the_first_step(name):
    """Muon's AdamW groups then run at the matrices' rate, 67 times their own."""
    model = net()
    optimizer = lw.Muon(lw.param_groups(model))
    ONE_RATE[name](optimizer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(2):
            take_step(optimizer, model, step)
    said = [str(each.message) for each in told if "were made with 0.0003 and 0.02" in str(each.message)]
    assert len(said) == (name in ("nanoGPT's loop", "OneCycleLR"))


def test_a_rule_that_comes_into_a_group_later_is_told_and_one_that_goes_is_gone():
    model = net()
    optimizer = lw.DMuon(lw.param_groups(model))
    take_step(optimizer, model, 0)
    for group in optimizer.param_groups:
        group["rates"] = lw.DualNormAdaptive()
    with pytest.raises(lw.LayerwiseError, match=r"came into the group of \w+\..* after the optimizer was made"):
        take_step(optimizer, model, 1)
    for group in optimizer.param_groups:
        group["rates"] = None
    take_step(optimizer, model, 2)


FOREIGN = {
    "name": "backbone",
    "rho": 0.05,
    "adaptive": False,
    "initial_lr": 0.3,
    "use_muon": True,
    "lr_scale": 0.5,
}


def with_keys(model, keys):
    return [{**group, **keys} for group in lw.param_groups(model)]


@pytest.mark.parametrize("way", ["given", "overridden", "later"])
def test_keys_of_the_users_own_are_kept_saved_and_loaded(way):
    model = net()
    if way == "given":
        optimizer = lw.Muon(with_keys(model, FOREIGN))
    elif way == "overridden":
        optimizer = lw.Muon(lw.param_groups(model, {"*": FOREIGN}))
    else:
        optimizer = lw.Muon(lw.param_groups(model))
        for group in optimizer.param_groups:
            group.update(FOREIGN)
    take_step(optimizer, model, 0)
    again = lw.Muon(lw.param_groups(twin(model)))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for found in (optimizer, again, copy.deepcopy(optimizer)):
        for group in found.param_groups:
            assert {key: group[key] for key in FOREIGN} == FOREIGN


def test_keys_that_a_checkpoint_lacks_stay_as_they_are():
    state = lw.Muon(lw.param_groups(net())).state_dict()
    assert not any("lr_scale" in group for group in state["param_groups"])  # as it was always saved
    optimizer = lw.Muon(with_keys(net(), FOREIGN))
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        assert {key: group[key] for key in FOREIGN} == FOREIGN


@pytest.mark.parametrize("strict", [True, False])
def test_a_schedule_made_before_loading_what_was_saved_without_one_goes_on(strict):
    state = lw.Muon(lw.param_groups(net()), lr=0.1).state_dict()
    optimizer = lw.Muon(lw.param_groups(net()), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, cycle_momentum=False)
    optimizer.load_state_dict(state, strict=strict)
    optimizer.step()
    schedule.step()  # reads the rates that it noted in each group
    assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.get_last_lr()[0]) != 0.1


@pytest.mark.parametrize("strict", [True, False])
def test_a_key_of_the_users_own_may_be_a_tensor_of_many_numbers(strict):
    theirs, ours = (with_keys(net(), {"mask": torch.tensor(numbers)}) for numbers in ([1.0, 2.0], [3.0, 4.0]))
    state, optimizer = lw.Muon(theirs).state_dict(), lw.Muon(ours)
    optimizer.load_state_dict(state, strict=strict)
    assert all(group["mask"].tolist() == [1.0, 2.0] for group in optimizer.param_groups)


@pytest.mark.filterwarnings("ignore:parameters are grouped by shape")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_without_parameters_is_a_group(name):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 3, bias=False))
    build = OPTIMIZERS[name] if name != "static" else lw.Lanton

    def make_one():
        found = build(
            [
                {"params": list(model.parameters()), "weight_decay": 0.1},
                {"params": [], "weight_decay": 0.0, "name": "no decay"},
            ]
        )
        found.add_param_group({"params": []})
        return found

    optimizer = make_one()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0, 0]
    for step in range(2):
        take_step(optimizer, model, step)
    again = make_one()
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[1]["name"] == "no decay"
    assert str(again.layer_rates()) == str(optimizer.layer_rates())


def test_the_table_tells_what_each_group_became():
    groups = lw.param_groups(net(), {"up.weight": {"lr_scale": 0.5, "name": "first"}, "head.weight": {"lr": 0.125}})
    optimizer = lw.Scion(groups, lr=0.25, weight_decay=0.1)
    header, rule, *lines = optimizer.groups_table().splitlines()
    assert len(lines) == len(optimizer.param_groups)
    assert header.split()[:4] == ["role", "parameters", "entries", "lr"]
    assert set(rule) == {"-", " "}
    (hidden,) = [line for line in lines if "first" in line]
    assert all(part in hidden for part in ("hidden", "60", "0.125 = 0.25 * 0.5", "0.1", "lmo", "Spectral", "name='first'"))
    muon = lw.Muon(lw.param_groups(net())).groups_table()
    assert muon.splitlines()[0].split()[-1] == "geometry"  # nothing of the user's own is kept
    assert "Spectral()" in muon  # a geometry at its defaults, which were written out
    assert "adamw" in muon
    assert "Sign" not in muon


def test_groups_that_are_all_empty_are_taken_as_torch_takes_them_and_no_group_is_an_error():
    with pytest.warns(UserWarning, match="all groups are empty"):
        optimizer = lw.Lanton([{"params": []}, {"params": []}])
    optimizer.step()
    assert optimizer.load_state_dict(optimizer.state_dict()) == ([], [])
    optimizer.add_param_group(lw.param_groups(net())[0])
    optimizer.step()
    for nothing in ([], iter(())):
        with pytest.raises(lw.LayerwiseError, match="got no parameters"):
            lw.Lanton(nothing)


def test_rates_are_in_the_order_of_the_model_whatever_the_groups_are():
    """They came group by group: a block's matrices, and its gains and biases behind the last block's."""
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)) for _ in range(3)])
    model.append(torch.nn.Linear(4, 4))
    model[3].weight = model[1][0].weight  # tied: in its first place
    names = [name for name, _ in model.named_parameters()]
    splits = {"2.0.weight": {"q": 1, "k": 3}}
    optimizer = lw.DualMuon(lw.param_groups(torch.nn.DataParallel(model), splits=splits))
    assert [name for group in optimizer.param_groups for name in group["param_names"]] != names
    units = [unit for name in names for unit in ([f"{name}[q]", f"{name}[k]"] if name in splits else [name])]
    assert list(optimizer.layer_rates()) == units
    frozen = model[0][0].weight.requires_grad_(False)
    late = lw.DualMuon(lw.param_groups(model, splits=splits))
    frozen.requires_grad_(True)
    assert late.add_trainable(model) == ["0.0.weight"]
    assert list(late.layer_rates()) == units
    del model, late, frozen
    assert optimizer.layer_rates().keys() == set(units)  # the order is gone with the model


def test_what_an_optimizer_prints_is_what_its_groups_read():
    """AdamW's groups had a geometry, a radius and a momentum, and those of unit steps Adam's betas."""
    said = repr(lw.DualMuon(lw.param_groups(torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(5)])), lr=0.01))
    assert said.startswith("DualMuon (\nParameter Group 0\n    geometry: Spectral(")
    matrices, vectors, head = (set(part.split("\n    ")[1:]) for part in said.removesuffix("\n)").split("\n\n"))
    of_both = {"layout", "lr", "param_names", "role", "update", "weight_decay"}
    of_steps = {"geometry", "momentum", "momentum_steps", "momentum_warmup", "nesterov", "norm_group", "radius", "rates"}
    of_steps.add("rate_steps")
    keys = [{line.partition(":")[0] for line in lines} for lines in (matrices, vectors, head)]
    assert keys == [
        of_both | of_steps | {"scaling"}, of_both | {"betas", "eps", "nu"}, of_both | {"betas", "eps", "nu", "lr_scale"},
    ]  # fmt: skip
    assert "param_names: 0.bias, 1.bias, 2.bias and 2 more" in vectors
    groups = lw.param_groups(torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(2)]), {"*": {"betas": (0.8, 0.9)}})
    with pytest.warns(UserWarning, match=r"betas=\(0.8, 0.9\) of the group of '0.weight' has no effect: lmo updates it$"):
        lw.DualMuon(groups)
