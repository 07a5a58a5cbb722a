"""A rule's numbers of all units are parts of one vector, which shows nowhere but in the time of a step."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from tiny import assert_same_bits, make, net, take_step, tensors, twin

import layerwise as lw


def trained(steps=2):
    model = net()
    optimizer = make("lanton", model)
    for seed in range(steps):
        take_step(optimizer, model, seed)
    return model, optimizer


def test_the_noise_of_all_units_of_a_norm_group_is_one_vector():
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False) for _ in range(3)])
    optimizer = lw.Lanton(lw.param_groups(model))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    hidden = [p for group in optimizer.param_groups if group["role"] == "hidden" for p in group["params"]]
    places = {optimizer.state[p]["noise"].untyped_storage().data_ptr() for p in hidden}
    assert len(hidden) > 1
    assert len(places) == 1


def test_a_tensor_that_is_put_in_the_place_of_a_units_state_is_used():
    model, optimizer = trained()
    other = twin(model)
    written = make("lanton", other)
    written.load_state_dict(optimizer.state_dict())
    for put, own in zip(model.parameters(), other.parameters(), strict=True):
        optimizer.state[put]["noise"] = torch.full_like(optimizer.state[put]["noise"], 7.0)
        written.state[own]["noise"].fill_(7.0)
    for some, stepped in ((model, optimizer), (other, written)):
        take_step(stepped, some, 5)
    assert_same_bits(tensors(model, optimizer), tensors(other, written))


def test_a_copy_of_an_optimizer_goes_its_own_way():
    model, optimizer = trained()
    pair = copy.deepcopy({"model": model, "optimizer": optimizer})
    before = tensors(model, optimizer)
    take_step(pair["optimizer"], pair["model"], 5)
    assert_same_bits(before, tensors(model, optimizer))
    take_step(optimizer, model, 5)
    assert_same_bits(tensors(model, optimizer), tensors(pair["model"], pair["optimizer"]))


def test_groups_in_another_order_keep_the_numbers_of_their_units():
    model, optimizer = trained()
    other = copy.deepcopy({"model": model, "optimizer": optimizer})
    optimizer.param_groups.reverse()
    for group in optimizer.param_groups:
        group["params"].reverse()
        group["param_names"].reverse()
    for seed in (5, 6):
        take_step(optimizer, model, seed)
        take_step(other["optimizer"], other["model"], seed)
    found = optimizer.layer_rates()
    for name, rate in other["optimizer"].layer_rates().items():
        assert abs(found[name].noise - rate.noise) <= 1e-5 * rate.noise  # sums come in another order


def test_a_group_that_grows_keeps_the_numbers_of_its_units():
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False) for _ in range(3)])
    model[1].weight.requires_grad_(False)
    optimizer = lw.Lanton(lw.param_groups(model))
    for seed in range(3):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
    before = {name: rate.noise for name, rate in optimizer.layer_rates().items()}
    model[1].weight.requires_grad_(True)
    assert optimizer.add_trainable(model) == ["1.weight"]
    model[1].weight.grad = torch.randn(4, 4)
    for name in (0, 2):
        model[name].weight.grad = None
    optimizer.step()
    after = {name: rate.noise for name, rate in optimizer.layer_rates().items()}
    assert {name: after[name] for name in before} == before


@dataclass(frozen=True)
class LastTwo(lw.RateRule):
    """Keeps the norm of the gradient, and the one before it."""

    unit_state: ClassVar = ("norm", "before")

    def norms(self):
        return [lw.DualNorm(lambda job: job.grad, lw.Frobenius())]

    def update(self, units):
        return {"norm": units.norms[0], "before": units.state["norm"]}


def test_a_rule_may_hand_on_a_number_as_another():
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False) for _ in range(3)])
    optimizer = lw.DMuon(lw.param_groups(model), rates=LastTwo())
    for size in (1.0, 2.0, 3.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, size)
        optimizer.step()
    for state in (optimizer.state[p] for p in model.parameters() if "norm" in optimizer.state[p]):
        assert float(state["norm"]) == 12.0
        assert float(state["before"]) == 8.0
