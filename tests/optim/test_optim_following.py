"""Models that change under their optimizer: unfrozen, resized, materialised, replaced, taken away."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from tiny import OPTIMIZERS, Net, assert_same_bits, loss_of, make, net, tensors
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import layerwise as lw

every_optimizer = pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "static"])
BACKBONE = ("embed", "up", "norm")


def freeze(model, on=True):
    for part in BACKBONE:
        getattr(model, part).requires_grad_(not on)
    return model


def train(optimizer, model, seeds=(0, 1)):
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.hold_half()
        optimizer.step()


def kinds(optimizer):
    return {
        name: tuple(repr(group[key]) for key in ("role", "layout", "geometry", "update", "rates"))
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def group_of(optimizer, name):
    return next(group for group in optimizer.param_groups if name in group["param_names"])


def silent(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args)


# ---------------------------------------------------------------------------------------------------------- unfrozen


@every_optimizer
def test_what_is_unfrozen_is_then_trained_as_if_it_had_always_been_there(name):
    model = freeze(net())
    optimizer = make(name, model)
    train(optimizer, model)
    freeze(model, on=False)
    added = optimizer.add_trainable(model)
    assert sorted(added) == ["embed.weight", "norm.bias", "norm.weight", "up.bias", "up.weight"]
    assert kinds(optimizer) == kinds(make(name, net()))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    silent(train, optimizer, model)
    assert all(not torch.equal(p, before[key]) for key, p in model.named_parameters())
    assert optimizer.add_trainable(model) == []


def test_they_take_the_rate_that_their_group_has_now_and_the_overrides_of_the_beginning():
    model = freeze(net())
    overrides = {"role:hidden": {"lr_scale": 0.5, "name": "matrices"}}
    optimizer = lw.Scion(lw.param_groups(model, overrides=overrides), lr=1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    freeze(model, on=False)
    optimizer.add_trainable(model)
    hidden = group_of(optimizer, "up.weight")
    assert (hidden["lr"], hidden["lr_scale"], hidden["name"]) == (0.125, 0.5, "matrices")
    assert "down.weight" in hidden["param_names"]
    assert group_of(optimizer, "embed.weight")["lr"] == 1.0  # a group of its own, with the optimizer's rate


def test_roles_come_from_the_forward_pass_that_the_groups_were_made_with():
    class LateHead(nn.Module):  # what is registered last is not the head
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 7)
            self.first = nn.Linear(3, 4)

        def forward(self, x):
            return self.out(self.first(x).relu())

    model = LateHead()
    model.out.requires_grad_(False)
    optimizer = lw.Scion(lw.param_groups(model, torch.ones(2, 3)))
    model.out.requires_grad_(True)
    optimizer.add_trainable(model)
    assert group_of(optimizer, "out.weight")["role"] == "head"


class FusedHead(nn.Module):
    """A weight in three parts, which only a forward pass shows, beside a head."""

    def __init__(self):
        super().__init__()
        self.fused = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.fused(x).split(4, dim=-1)
        return self.head((q @ k.T).softmax(-1) @ v)


@pytest.mark.parametrize("again", [None, torch.ones(2, 4)])
def test_a_new_head_and_what_comes_with_it_take_the_rates_of_now_without_a_second_look_at_the_rest(again):
    model = FusedHead()
    optimizer = lw.DualMuon(lw.param_groups(model, torch.ones(2, 4)), lr=1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    model.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    silent(optimizer.add_trainable, model, again)
    assert [group["lr"] for group in optimizer.param_groups if group["params"]] == [0.125] * 3 + [1.0]
    assert group_of(optimizer, "head.3.weight")["lr_scale"] == 3  # the group of the head before
    assert str(group_of(optimizer, "fused.weight")["layout"]) == "out,in q|k|v"
    assert group_of(optimizer, "head.1.weight")["params"] == [model.head[1].weight]  # the first matrix in one part


def test_matrices_that_are_new_join_the_group_of_those_like_them_beside_a_weight_in_parts():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), FusedHead())
    optimizer = lw.Muon(lw.param_groups(model, torch.ones(2, 4)), lr=1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    model[0].append(nn.Linear(4, 4))
    assert sorted(silent(optimizer.add_trainable, model)) == ["0.1.bias", "0.1.weight"]
    assert group_of(optimizer, "0.1.weight") is group_of(optimizer, "0.0.weight")
    model[0].append(FusedHead().fused)
    with pytest.warns(UserWarning, match=r"roles of 1 parameters are not certain.*add_trainable\(model, batch\)"):
        optimizer.add_trainable(model)


@every_optimizer
def test_what_is_unfrozen_is_trained_from_the_next_step_on_which_says_so_once(name):
    model, asked = freeze(net()), freeze(net())
    optimizer, other = make(name, model), make(name, asked)
    for run, its_model in ((optimizer, model), (other, asked)):
        train(run, its_model)
        freeze(its_model, on=False)
    other.add_trainable(asked)
    with pytest.warns(UserWarning, match=r"'embed.weight'.* are trained from this step on.*add_trainable\(model\)"):
        train(optimizer, model, [0])
    silent(train, other, asked, [0])
    assert_same_bits(tensors(model, optimizer), tensors(asked, other))
    silent(train, optimizer, model)


def test_what_is_unfrozen_is_left_to_others_where_the_optimizer_was_not_given_all():
    model = freeze(net())
    groups = lw.param_groups(model)
    optimizer = lw.Muon([group for group in groups if group["role"] == "hidden"])
    freeze(model, on=False)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with pytest.warns(UserWarning, match=r"'embed.weight'.*not trained by it: call optimizer.add_trainable"):
        train(optimizer, model, [0])
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {"down.weight"}
    silent(train, optimizer, model)


def test_a_schedule_is_made_again_where_a_group_was_added_and_all_groups_are_where_they_would_be():
    model = freeze(net())
    optimizer = lw.Scion(lw.param_groups(model), lr=1.0)
    schedule = LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for seed in range(3):
        train(optimizer, model, [seed])
        schedule.step()
    freeze(model, on=False)
    assert optimizer.add_trainable(model)
    again = LambdaLR(optimizer, lambda t: 1 / (1 + t), last_epoch=schedule.last_epoch - 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * len(optimizer.param_groups)
    train(optimizer, model, [3])
    again.step()
    whole = net()
    other = lw.Scion(lw.param_groups(whole), lr=1.0)
    later = LambdaLR(other, lambda t: 1 / (1 + t))
    other.load_state_dict(optimizer.state_dict())
    later.load_state_dict(again.state_dict())
    for run, its_schedule in ((optimizer, again), (other, later)):
        its_schedule.step()
        assert [group["lr"] for group in run.param_groups] == [1 / 6] * len(run.param_groups)


@every_optimizer
@pytest.mark.parametrize("strict", [True, False])
def test_a_run_that_unfroze_resumes_as_the_whole_model(name, strict):
    model = freeze(net())
    optimizer = make(name, model, lr=0.5)
    train(optimizer, model)
    freeze(model, on=False)
    optimizer.add_trainable(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.25
    train(optimizer, model)
    other = net(seed=3)
    again = make(name, other)
    order = [group["param_names"] for group in again.param_groups]
    assert order != [group["param_names"] for group in optimizer.param_groups]
    other.load_state_dict(model.state_dict())
    assert again.load_state_dict(copy.deepcopy(optimizer.state_dict()), strict=strict) == ([], [])
    assert [group["param_names"] for group in again.param_groups] == order
    assert all(group["lr"] == 0.25 for group in again.param_groups)
    assert_same_bits(tensors(model, optimizer), tensors(other, again))
    for run, its_model in ((optimizer, model), (again, other)):
        train(run, its_model, [5])
    for (key, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        # parameters are summed over in another order where they stand in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=key)


def test_a_state_with_two_rates_in_what_is_one_group_now_is_not_loaded():
    model = net()
    up_apart = lw.Scion(lw.param_groups(model, overrides={"up.weight": {"lr": 0.5}}), lr=1.0)
    with pytest.raises(lw.LayerwiseError, match="of another model or optimizer"):
        lw.Scion(lw.param_groups(net())).load_state_dict(up_apart.state_dict())


def test_plain_parameters_of_a_known_model_get_their_roles_and_keep_the_options_given():
    model = freeze(net())
    optimizer = make("lanton", model)
    freeze(model, on=False)
    backbone = [p for part in BACKBONE for p in getattr(model, part).parameters()]
    stranger = nn.Parameter(torch.ones(3, 2))
    with pytest.warns(UserWarning, match="by shape alone"):  # of the stranger
        optimizer.add_param_group({"params": [*backbone, stranger], "lr": 0.125})
    assert {key: kind for key, kind in kinds(optimizer).items() if key in kinds(make("lanton", net()))} == kinds(
        make("lanton", net())
    )
    assert group_of(optimizer, "embed.weight")["lr"] == 0.125
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters())) + 1


# ----------------------------------------------------------------------------------------- resized and materialised


def resize(model, entries):
    """As transformers does: the embedding's data in place, another module for the head."""
    rows = min(entries, len(model.embed.weight))
    table, head = nn.Embedding(entries, 6), nn.Linear(6, entries, bias=False)
    with torch.no_grad():
        table.weight[:rows] = model.embed.weight[:rows]
        head.weight[:rows] = model.head.weight[:rows]
    model.embed.weight.data = table.weight.data
    model.head = head


def momentum_of(optimizer, param):
    return next(g["momentum"] for g in optimizer.param_groups for p in g["params"] if p is param)


@every_optimizer
@pytest.mark.parametrize("entries", [14, 9])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_resized_vocabulary_is_followed_and_its_rows_keep_their_state(name, entries, steps):
    model = net()
    optimizer = make(name, model)
    train(optimizer, model, range(steps))
    old = {
        key: {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()}
        for key, p in (("embed", model.embed.weight), ("head", model.head.weight))
    }
    resize(model, entries)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer.zero_grad()
    ids = torch.arange(9).reshape(1, 9)
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.hold_half()
    silent(optimizer.step)
    assert all(not torch.equal(p, before[key]) for key, p in model.named_parameters())
    rows = min(entries, 11)
    for key, p in (("embed", model.embed.weight), ("head", model.head.weight)):
        assert p.shape[0] == entries
        for kind, value in optimizer.state[p].items():
            if torch.is_tensor(value) and value.shape == p.shape and kind in ("exp_avg_sq", "momentum_buffer"):
                decay, grad = (0.95, p.grad**2) if kind == "exp_avg_sq" else (momentum_of(optimizer, p), p.grad)
                expected = (1 - decay) * grad
                expected[:rows] += decay * old[key][kind][:rows]
                torch.testing.assert_close(value, expected)
    assert all(p.grad is not None for group in optimizer.param_groups for p in group["params"])


@every_optimizer
def test_a_model_materialised_after_its_optimizer_was_made_is_trained(name):
    with torch.device("meta"):
        model = Net()
    optimizer = make(name, model)
    model.to_empty(device="cpu")
    twin = net()
    model.load_state_dict(twin.state_dict())
    ours = make(name, twin)
    for run, its_model in ((optimizer, model), (ours, twin)):
        silent(train, run, its_model)
    assert_same_bits(tensors(twin, ours), tensors(model, optimizer))


def test_where_the_model_is_not_known_a_parameter_without_numbers_is_an_error():
    with torch.device("meta"):
        model = Net()
    optimizer = copy.deepcopy(make("lanton", model))
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.ones_(p)
    loss_of(model).backward()
    with pytest.raises(lw.LayerwiseError, match=r"'embed.weight' is on the meta device.*add_trainable\(model\)"):
        optimizer.step()
    assert optimizer.add_trainable(model) == []
    before = model.up.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.up.weight)


# ------------------------------------------------------------------------------------------------ replaced and gone


def test_a_replaced_parameter_is_followed_and_a_lost_state_is_said():
    model = net()
    optimizer = make("lanton", model)
    train(optimizer, model)
    model.up.weight = nn.Parameter(model.up.weight.detach().clone())
    momentum = optimizer.state[group_of(optimizer, "up.weight")["params"][0]]
    assert momentum
    silent(train, optimizer, model)
    assert any(model.up.weight is p for p in group_of(optimizer, "up.weight")["params"])
    model.up, model.norm, model.down = nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 6, bias=False)
    with pytest.warns(UserWarning, match=r"'up.weight', .* begins afresh"):
        train(optimizer, model, [3])
    assert len(optimizer.state) == len(list(model.parameters()))


class Quantised(nn.Module):
    """A linear layer whose matrix is whole numbers, as libraries for it make them."""

    def __init__(self, linear):
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max() / 127)
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def take_away(model):
    model.down = nn.Identity()
    model.norm = nn.LayerNorm(6)
    model.up = nn.Linear(6, 6)


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        (lambda model: setattr(model, "up", Quantised(model.up)), {"up.weight"}),
        (lambda model: setattr(model, "norm", nn.Identity()), {"norm.weight", "norm.bias"}),
    ],
    ids=["quantised", "taken away"],
)
def test_a_parameter_that_is_gone_is_an_error_that_names_it_and_the_way_out(change, gone):
    model = net()
    optimizer = make("lanton", model)
    train(optimizer, model)
    change(model)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with pytest.raises(lw.LayerwiseError, match=rf"{min(gone)!r}|{max(gone)!r}.*add_trainable\(model\)"):
        train(optimizer, model, [2])
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    assert optimizer.add_trainable(model) == []
    silent(train, optimizer, model)
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == {name for name, p in net().named_parameters()} - gone


def test_a_copy_of_an_optimizer_follows_nobody():
    model = net()
    optimizer = make("lanton", model)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        loss_of(model).backward()
        theirs = [p for group in other.param_groups for p in group["params"]]
        other.zero_grad()
        other.step()
        assert all(p is not q for p in theirs for q in model.parameters())
        assert {id(p) for group in other.param_groups for p in group["params"]} == {id(p) for p in theirs}


def test_master_copies_that_a_framework_put_into_the_groups_stay_there():
    model = net()
    optimizer = make("lanton", model)
    masters = {}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            masters[p] = group["params"][i] = nn.Parameter(p.detach().clone())
    loss_of(model).backward()
    for p, master in masters.items():
        master.grad = p.grad
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # none has a gradient
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, masters.values()))


def test_the_groups_do_not_keep_a_model_alive():
    model = net()
    groups = lw.param_groups(model)
    parameters = [p for group in groups for _, p in group["params"]]
    alive = groups[0]["origin"]
    assert alive.model is model
    del model
    gc.collect()
    assert alive.model is None
    optimizer = lw.Lanton(groups)
    optimizer.step()
    assert parameters


@pytest.mark.parametrize("other", [nn.Linear(2, 2), [nn.Linear(2, 2)]], ids=["another model", "a list"])
def test_what_is_not_the_model_is_refused(other):
    optimizer = lw.Lanton(lw.param_groups(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))))
    with pytest.raises(lw.LayerwiseError, match=r"add_trainable: (Linear holds none|model is of type list)"):
        optimizer.add_trainable(other)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_a_model_is_followed_after_a_state_was_loaded():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
    optimizer = lw.DMuon(lw.param_groups(model), lr=0.1)

    def step():
        optimizer.zero_grad()
        model(torch.arange(6)).square().mean().backward()
        optimizer.step()

    step()
    optimizer.load_state_dict(optimizer.state_dict())
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    step()  # the old tensor has no gradient any more: the new one is found
    before = model[1].weight.detach().clone()
    step()
    assert not torch.equal(model[1].weight, before)


@every_optimizer
def test_parameters_that_are_replaced_again_and_again_are_followed(name):
    """As `load_state_dict(..., assign=True)` of averaged weights to evaluate, and back: from the second on none was."""
    model, plain = net(), net()
    optimizer, own = make(name, model), make(name, plain)
    for seed in range(4):
        train(optimizer, model, [seed])
        train(own, plain, [seed])
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert_same_bits(dict(model.named_parameters()), dict(plain.named_parameters()))
