"""A model that grew or shrank takes its optimizer's state along: `load_state_dict(strict=False)`, by names."""

import pytest
import torch
from tiny import OPTIMIZERS, assert_same_bits, make, net, take_step, tensors
from torch import nn

import layerwise as lw


def stack(blocks, vocabulary=11):
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(vocabulary, 6)})
    model["blocks"] = nn.ModuleList(nn.Linear(6, 6) for _ in range(blocks))
    model["head"] = nn.Linear(6, vocabulary, bias=False)
    return model


def trained(name, model, steps=3):
    optimizer = OPTIMIZERS[name](groups(model))
    for step in range(steps):
        take_step(optimizer, model, step)
    return optimizer


def groups(model):
    roles = {"embed.weight": {"role": "embedding"}, "head.weight": {"role": "head"}}
    return lw.param_groups(model, overrides=roles)


def state_by_name(optimizer):
    return {
        f"{name}.{key}": value
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state[param].items()
    }


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "static"])
def test_blocks_may_come_and_go(name):
    old = trained(name, stack(2))
    larger = OPTIMIZERS[name](groups(stack(3)))
    fresh = {key: value.clone() for key, value in state_by_name(larger).items()}
    found = larger.load_state_dict(old.state_dict(), strict=False)
    assert sorted(found.missing) == ["blocks.2.bias", "blocks.2.weight"]
    assert found.unexpected == []
    before = state_by_name(old)
    for key, value in state_by_name(larger).items():
        expected = before.get(key, fresh[key])
        assert torch.equal(value, expected), key
    again = OPTIMIZERS[name](groups(stack(2)))
    found = again.load_state_dict(larger.state_dict(), strict=False)
    assert found.missing == []
    assert sorted(found.unexpected) == ["blocks.2.bias", "blocks.2.weight"]
    for key, value in state_by_name(again).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["lanton", "muon", "scion-dual"])
@pytest.mark.parametrize(("before", "after"), [(11, 14), (14, 11)])
def test_rows_of_a_vocabulary_that_stay_keep_their_state(name, before, after):
    old = trained(name, stack(1, before))
    new = OPTIMIZERS[name](groups(stack(1, after)))
    assert new.load_state_dict(old.state_dict(), strict=False).missing == []
    rows = min(before, after)
    theirs, mine = state_by_name(old), state_by_name(new)
    fresh = state_by_name(OPTIMIZERS[name](groups(stack(1, after))))
    for key in mine:
        if key.endswith(".size"):  # of the parameter as it is: the rules weigh units by it
            assert torch.equal(mine[key], fresh[key]), key
    for key in mine:
        if key.startswith(("embed", "head")) and mine[key].ndim == 2:
            assert torch.equal(mine[key][:rows], theirs[key][:rows]), key
            assert not mine[key][rows:].any(), key


class Adapted(nn.Module):
    """A layer, and beside it an adapter of rank 2."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["lanton", "muon", "dual-muon"])
def test_adapters_that_were_added_start_anew(name):
    model = nn.ModuleDict({"a": nn.ModuleDict({"layer": nn.Linear(6, 6)}), "b": nn.Linear(6, 6)})
    old = OPTIMIZERS[name](lw.param_groups(model))
    take_step(old, model, 0)
    larger = nn.ModuleDict({"a": Adapted(), "b": nn.Linear(6, 6)})
    new = OPTIMIZERS[name](lw.param_groups(larger))
    found = new.load_state_dict(old.state_dict(), strict=False)
    assert (sorted(found.missing), found.unexpected) == (["a.down.weight", "a.up.weight"], [])
    theirs, mine = state_by_name(old), state_by_name(new)
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    take_step(new, larger, 1)


def test_a_widened_layer_starts_anew_and_is_named():
    small, large = (nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)) for width in (4, 5))
    state = lw.Lanton(lw.param_groups(small)).state_dict()
    found = lw.Lanton(lw.param_groups(large)).load_state_dict(state, strict=False)
    assert sorted(found.missing) == ["0.bias", "0.weight", "1.weight"]


def test_of_the_same_model_it_is_the_strict_load():
    model, other = net(), net()
    optimizer = make("lanton", model, lr=torch.tensor(0.3))
    take_step(optimizer, model, 0)
    optimizer.param_groups[0]["weight_decay"] = 0.7
    again = make("lanton", other, lr=torch.tensor(0.1))
    assert again.load_state_dict(optimizer.state_dict(), strict=False) == ([], [])
    other.load_state_dict(model.state_dict())
    assert_same_bits(tensors(model, optimizer), tensors(other, again))
    for mine, theirs in zip(again.param_groups, optimizer.param_groups, strict=True):
        assert float(mine["lr"]) == pytest.approx(float(theirs["lr"]))
        assert mine["weight_decay"] == theirs["weight_decay"]


def test_the_strict_load_names_what_is_in_one_only_and_the_way_out():
    old = trained("lanton", stack(2))
    with pytest.raises(lw.LayerwiseError, match=r"it lacks 'blocks.2.*strict=False"):
        lw.Lanton(groups(stack(3))).load_state_dict(old.state_dict())
    assert lw.Lanton(groups(stack(2))).load_state_dict(old.state_dict()) == ([], [])


def test_a_state_without_names_says_so():
    state = trained("lanton", stack(1)).state_dict()
    for group in state["param_groups"]:
        del group["param_names"]
    with pytest.raises(lw.LayerwiseError, match="by name, and this state holds no names"):
        lw.Lanton(groups(stack(1))).load_state_dict(state, strict=False)
