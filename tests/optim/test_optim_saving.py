"""State that survives: plain state_dicts, deepcopy, pickle, another process; and checkpoints that do not belong."""

import copy
import io
import pickle
import subprocess
import sys
from collections import UserList
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import OPTIMIZERS, assert_same_bits, make, net, take_step, tensors, twin

import layerwise as lw

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("name", "dtype", "lr"),
    [
        *((name, dtype, 0.01) for name in OPTIMIZERS for dtype in (torch.float32, torch.bfloat16)),
        *(("d-muon-noise", torch.float32, lr) for lr in (np.float32(0.01), torch.tensor(0.01))),
    ],
)
def test_a_saved_state_continues_bit_for_bit(name, dtype, lr):
    model = net(dtype)
    optimizer = make(name, model, lr=lr)
    for step in range(3):
        take_step(optimizer, model, step)
    state = through_a_file(optimizer.state_dict())
    assert all(type(group["lr"]) is float for group in state["param_groups"])
    other = twin(model)
    again = make(name, other, lr=0.5 if not isinstance(lr, torch.Tensor) else torch.tensor(0.5))
    again.load_state_dict(state)
    assert_same_bits(tensors(model, optimizer), tensors(other, again))  # dtypes too: noise stays float32
    for step in range(3, 6):
        take_step(optimizer, model, step)
        take_step(again, other, step)
    assert_same_bits(tensors(model, optimizer), tensors(other, again))
    assert str(optimizer.layer_rates()) == str(again.layer_rates())


def test_loading_neither_aliases_nor_changes_what_was_given():
    model = net()
    optimizer = make("lanton", model)
    take_step(optimizer, model, 0)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    other = twin(model)
    again = make("lanton", other)
    again.load_state_dict(state)
    take_step(again, other, 1)
    assert str(state["param_groups"]) == str(kept["param_groups"])
    for index, values in kept["state"].items():
        for key, value in values.items():
            assert torch.equal(state["state"][index][key], value), (index, key)


def test_a_groups_tensor_lr_stays_the_same_tensor_and_takes_the_saved_value():
    model = net()
    optimizer = make("lanton", model, lr=torch.tensor(0.01))
    state = optimizer.state_dict()
    lr = torch.tensor(0.5)
    again = make("lanton", net(), lr=lr)
    own = [group["lr"] for group in again.param_groups]  # a compiled step reads them
    again.load_state_dict(state)
    assert all(group["lr"] is tensor for group, tensor in zip(again.param_groups, own, strict=True))
    assert [tensor.item() for tensor in own] == pytest.approx([0.01] * len(own))
    assert lr.item() == 0.5  # the caller's, of which each group has a copy


@every_optimizer
@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_the_optimizer_itself_copies_and_pickles(name, way):
    model = net()
    optimizer = OPTIMIZERS[name](lw.param_groups(model))
    for step in range(2):
        take_step(optimizer, model, step)
    other, again = way((model, optimizer))
    for step in range(2, 4):
        take_step(optimizer, model, step)
        take_step(again, other, step)
    assert_same_bits(tensors(model, optimizer), tensors(other, again))
    with pytest.warns(UserWarning, match="shape"):
        again.add_param_group({"params": [torch.nn.Parameter(torch.randn(3, 2))]})
    again.load_state_dict(again.state_dict())


def test_a_hook_may_change_what_is_loaded():
    """torch's contract: what `register_load_state_dict_pre_hook` returns is loaded in place of what was given."""
    optimizer, again = make("lanton", net()), make("lanton", net())
    state = optimizer.state_dict()

    def filled(_, given):
        values = {i: {**state, "momentum_buffer": state["momentum_buffer"] + 7} for i, state in given["state"].items()}
        return {**given, "state": values, "skipped_steps": 3}

    again.register_load_state_dict_pre_hook(filled)
    again.load_state_dict(state)
    assert all((state["momentum_buffer"] == 7).all() for state in again.state.values())
    assert again.skipped_steps == 3
    assert all((state["momentum_buffer"] == 0).all() for state in optimizer.state.values())


@pytest.mark.parametrize("strict", [True, False])
def test_a_hook_is_told_when_all_is_loaded(strict):
    optimizer, told = make("lanton", net()), []
    optimizer.register_load_state_dict_post_hook(told.append)
    optimizer.load_state_dict(make("lanton", net()).state_dict(), strict=strict)
    assert told == [optimizer]


@pytest.mark.parametrize("strict", [True, False])
def test_a_rate_saved_with_its_scale_in_it_is_not_scaled_again(strict):
    """As 0.1.0 saved the head of DualMuon, whose groups had no `lr_scale`."""
    saved = make("dual-muon", net()).state_dict()
    for group in saved["param_groups"]:
        group["lr"] *= group.pop("lr_scale", 1.0)
    optimizer = make("dual-muon", net())
    rates = {name: rate.lr for name, rate in optimizer.layer_rates().items()}
    optimizer.load_state_dict(saved, strict=strict)
    assert {name: rate.lr for name, rate in optimizer.layer_rates().items()} == pytest.approx(rates)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lw.NoiseAdaptive(alpha=0, beta=0), lw.NoiseAdaptive(alpha=0.0, beta=0.0)),
        (lw.NormAdaptive(ceiling=2), lw.NormAdaptive(ceiling=2.0)),
        (
            lw.StaticRates({"up.weight": 1, "down.weight": 0.5}),
            lw.StaticRates({"down.weight": 0.5, "up.weight": 1.0}),
        ),
    ],
)
def test_equal_rules_load_each_other(one, other):
    assert one == other
    lw.Lanton(lw.param_groups(net()), rates=other).load_state_dict(lw.Lanton(lw.param_groups(net()), rates=one).state_dict())


SCRIPT = """
import sys, torch, tiny
name, path = sys.argv[1:]
saved = torch.load(path + ".start", weights_only=True)
model = tiny.net(torch.bfloat16, seed=5)
model.load_state_dict(saved["model"])
optimizer = tiny.make(name, model)
optimizer.load_state_dict(saved["optimizer"])
for step in range(3, 5):
    tiny.take_step(optimizer, model, step)
torch.save(tiny.tensors(model, optimizer), path + ".end")
"""


def test_a_new_process_continues_bit_for_bit(tmp_path):
    names = ["lanton", "d-muon-noise", "namo"]
    loop = f"import sys\nfor name in {names!r}:\n    sys.argv[1:] = [name, sys.argv[-1].rsplit('/', 1)[0] + '/' + name]\n"
    program = loop + "".join(f"    {line}\n" for line in SCRIPT.strip().splitlines())
    ends = {}
    for name in names:
        model = net(torch.bfloat16)
        optimizer = make(name, model)
        for step in range(3):
            take_step(optimizer, model, step)
        start = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(start, tmp_path / f"{name}.start")
        for step in range(3, 5):
            take_step(optimizer, model, step)
        ends[name] = tensors(model, optimizer)
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "any")],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for name, end in ends.items():
        assert_same_bits(end, torch.load(tmp_path / f"{name}.end", weights_only=True))


def test_the_state_holds_nothing_but_numbers_text_and_tensors():
    model = net()
    optimizer = make("lanton", model)
    take_step(optimizer, model, 0)

    def check(value):
        if isinstance(value, dict):
            return all(check(v) for v in value.values())
        if isinstance(value, (list, tuple)):
            return all(check(v) for v in value)
        return isinstance(value, (int, float, str, type(None), torch.Tensor))

    assert check(optimizer.state_dict())


def other_model():
    class Bigger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(6, 12), torch.nn.Linear(12, 6)

        def forward(self, x):
            return self.down(self.up(x))

    return Bigger()


def renamed():
    model = net()
    model.aside, model.down = model.down, torch.nn.Identity()
    return lw.Lanton(lw.param_groups(model))


WRONG = {
    "another optimizer": (
        lambda: make("muon", net()),
        r"rates of 'embed.weight' is None in it and NoiseAdaptive",
    ),
    "another noise rule": (
        lambda: make("lanton-momentum", net()),
        r"rates of 'embed.weight' is NoiseAdaptive\(alpha=1.0",
    ),
    "another geometry": (
        lambda: lw.Lanton(lw.param_groups(net(), overrides={"head.weight": _sign()})),
        r"geometry of 'head.weight' is Sign\(per_input=False\) in it and Sign\(per_input=True\) here",
    ),
    "fewer groups": (
        lambda: lw.Lanton(lw.param_groups(other_model())),
        r"it has \d parameter groups, this optimizer \d",
    ),
    "another name": (renamed, r"it has the parameter 'aside.weight' where this one has 'down.weight'"),
}


def _sign():
    from layerwise.geometry import Sign

    return Sign()


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (lw.Muon, lw.DMuon, "scaling of 'up.weight' is floored in it"),
        (
            lw.Lanton,
            lambda g: lw.Lanton(g, scaling="unit"),
            "scaling of 'embed.weight' is rms_0.2 in it and unit",
        ),
        (lw.Scion, lambda g: lw.Scion(g, radius={"hidden": 7.0}), "radius of '(up|down).weight' is"),
        (
            lw.Muon,
            lambda g: lw.Muon(g, nesterov=False),
            "nesterov of 'up.weight' is True in it and False here",
        ),
    ],
)
def test_steps_of_another_size_or_direction_are_another_optimizer(one, other, message):
    with pytest.raises(lw.LayerwiseError, match=message):
        other(lw.param_groups(net())).load_state_dict(one(lw.param_groups(net())).state_dict())


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(case):
    model = net()
    optimizer = make("lanton", model)
    take_step(optimizer, model, 0)
    before = tensors(model, optimizer)
    build, message = WRONG[case]
    with pytest.raises(lw.LayerwiseError, match=message) as error:
        optimizer.load_state_dict(through_a_file(build().state_dict()))
    assert "another model or optimizer" in str(error.value)
    assert "\n" not in str(error.value)
    assert_same_bits(before, tensors(model, optimizer))
    take_step(optimizer, model, 1)


def test_a_checkpoint_of_another_width_names_the_shapes():
    small, large = (torch.nn.Sequential(torch.nn.Linear(3, w), torch.nn.Linear(w, 2)) for w in (4, 5))
    state = lw.Lanton(lw.param_groups(large)).state_dict()
    with pytest.raises(lw.LayerwiseError, match=r"momentum_buffer of '0.weight' has shape \(5, 3\) in it and \(4, 3\)"):
        lw.Lanton(lw.param_groups(small)).load_state_dict(state)


def test_torchs_adamw_checkpoint_is_refused():
    model = net()
    state = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(lw.LayerwiseError, match="another model or optimizer"):
        make("lanton", net()).load_state_dict(state)


@pytest.mark.parametrize("garbage", [{}, {"model": {}}, None, [1], {"state": {}}])
def test_what_is_no_state_of_an_optimizer_is_refused(garbage):
    with pytest.raises(lw.LayerwiseError, match="not the state of an optimizer"):
        make("lanton", net()).load_state_dict(garbage)


def test_the_state_is_not_kept_where_a_parameter_has_lost_it():
    model = net()
    optimizer = make("lanton", model)
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["noise"]
    with pytest.raises(lw.LayerwiseError, match=r"the state of 'embed.weight' holds \['gradients_seen'"):
        optimizer.load_state_dict(state)


def test_a_kind_of_update_says_which_options_have_to_be_the_same():
    @dataclass(frozen=True)
    class Still(lw.Update):
        fixed = ("eps",)

        def allocate(self, group, name, param):
            return {}

        def step(self, jobs, work, keep):
            pass

    def optimizer(eps, lr):
        return lw.LayerwiseOptimizer(lw.param_groups(net()), {"default": {"update": Still()}}, lr=lr, eps=eps)

    saved = optimizer(eps=1e-8, lr=0.1).state_dict()
    same = optimizer(eps=1e-8, lr=0.2)
    same.load_state_dict(saved)
    assert {group["lr"] for group in same.param_groups} == {0.1}
    with pytest.raises(lw.LayerwiseError, match="eps of"):
        optimizer(eps=1e-6, lr=0.1).load_state_dict(saved)


def test_another_optimizers_checkpoint_of_our_groups_is_read_as_weights_alone():
    """`torch.load` reads known classes only, and torch's AdamW saves all that is in a group."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 2, 3, groups=2), torch.nn.Flatten(), torch.nn.Linear(2, 6), torch.nn.GELU()
    )
    overrides = {"0.weight": lw.Frobenius()}
    groups = lw.param_groups(model, overrides=overrides, splits={"2.weight": {"q": 2, "k": 4}})
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    model(torch.ones(1, 2, 3, 3)).sum().backward()
    optimizer.step()
    state = through_a_file(optimizer.state_dict())
    again = torch.optim.AdamW(lw.param_groups(model, overrides=overrides, splits={"2.weight": {"q": 2, "k": 4}}), lr=0.2)
    again.load_state_dict(state)
    for saved, group in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert (group["lr"], group["layout"], group["geometry"]) == (0.1, saved["layout"], saved["geometry"])


def test_a_list_of_a_configuration_is_one(tmp_path):
    """omegaconf's ListConfig, which hydra gives for `adamw_betas: [0.8, 0.9]`, is a sequence of its own class."""
    betas = UserList([0.8, 0.9])
    optimizer = lw.DualMuon(lw.param_groups(net(), overrides={"role:head": {"betas": betas}}), adamw_betas=betas)
    assert {tuple(group["betas"]) for group in optimizer.param_groups if repr(group["update"]) == "adamw"} == {(0.8, 0.9)}
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with pytest.raises(lw.LayerwiseError, match="give two numbers"):
        lw.DualMuon(lw.param_groups(net()), adamw_betas=UserList([0.8]))
