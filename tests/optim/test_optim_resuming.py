"""A run that goes on elsewhere: other wrappers, no names, numbers that some tool wrote as plain floats."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import OPTIMIZERS, assert_same_bits, make, net, set_gradients, take_step, tensors, twin
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import layerwise as lw

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Around(torch.nn.Module):
    """What DistributedDataParallel does to names."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def inside(wrap):
    def change(model):
        model.up = wrap(model.up)
        return model

    return change


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "ddp": Around,
    "ddp of a compiled one": lambda model: Around(torch.compile(model, backend="eager")),
    "checkpointing inside": inside(checkpoint_wrapper),
    "a compiled block": inside(lambda block: torch.compile(block, backend="eager")),
    "ddp inside": inside(Around),
}


@pytest.mark.filterwarnings("ignore:parameters are grouped by shape")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("named", [lw.param_groups, lambda model: model.named_parameters()])
def test_a_run_goes_on_under_other_wrappers(wrapper, strict, back, named):
    def made(wrapped, model):
        return lw.Lanton(named(WRAPPERS[wrapper](model) if wrapped else model))

    model = net()
    plain = twin(model)
    optimizer, again = made(not back, model), made(back, plain)
    set_gradients(model, 0)
    optimizer.step()
    found = again.load_state_dict(optimizer.state_dict(), strict=strict)
    assert (found.missing, found.unexpected) == ([], [])
    names = [group["param_names"] for group in again.param_groups]
    for one, other in zip(optimizer.param_groups, again.param_groups, strict=True):
        for mine, theirs in zip(one["params"], other["params"], strict=True):
            for key, value in optimizer.state[mine].items():
                assert torch.equal(value, again.state[theirs][key]), key
    made_afresh = made(back, net())
    assert names == [group["param_names"] for group in made_afresh.param_groups]  # its own names, not the saved ones


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("wrapper", ["compile", "checkpointing inside", "a compiled block"])
@pytest.mark.parametrize("back", [False, True])
def test_a_run_goes_on_under_other_wrappers_by_dcp(wrapper, back, tmp_path):
    def made(wrapped):
        model = WRAPPERS[wrapper](net()) if wrapped else net()
        return model, lw.Lanton(lw.param_groups(model))

    def step(model, optimizer, seeds):
        for seed in seeds:
            set_gradients(model, seed)
            optimizer.step()

    (model, optimizer), (again, its_optimizer), (whole, uninterrupted) = (
        made(not back),
        made(back),
        made(back),
    )
    step(model, optimizer, range(2))
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=tmp_path)
    found = dict(zip(("model", "optimizer"), get_state_dict(again, its_optimizer), strict=True))
    dcp.load(found, checkpoint_id=tmp_path)
    set_state_dict(again, its_optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    step(again, its_optimizer, range(2, 4))
    step(whole, uninterrupted, range(4))
    for mine, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:parameters are grouped by shape")
@pytest.mark.parametrize("back", [False, True])
def test_named_and_unnamed_parameters_load_each_other(back):
    def made(with_names):
        model = net()
        return lw.Lanton(model.named_parameters() if with_names else model.parameters())

    optimizer, again = made(not back), made(back)
    names = [group["param_names"] for group in again.param_groups]
    again.load_state_dict(optimizer.state_dict())
    assert names == [group["param_names"] for group in again.param_groups]


def test_a_module_step_that_tells_two_parameters_apart_is_not_overlooked():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.module = torch.nn.Linear(3, 3), torch.nn.Module()
            self.module.up = torch.nn.Linear(3, 3)

    optimizer, again = (lw.Lanton(lw.param_groups(Two())) for _ in range(2))
    for number, state in enumerate(optimizer.state.values()):
        state["momentum_buffer"].fill_(number)
    again.load_state_dict(optimizer.state_dict(), strict=False)
    for one, other in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])


def with_plain_numbers(state):
    """Every tensor of one entry as a float."""
    found = copy.deepcopy(state)
    for values in found["state"].values():
        values.update({k: float(v) for k, v in values.items() if torch.is_tensor(v) and v.numel() == 1})
    return found


@every_optimizer
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_with_plain_numbers_goes_on_bit_for_bit(name, strict):
    model = net()
    optimizer = make(name, model)
    for step in range(2):
        take_step(optimizer, model, step)
    other = twin(model)
    again = make(name, other)
    found = again.load_state_dict(with_plain_numbers(optimizer.state_dict()), strict=strict)
    assert not found.missing
    for m, o in ((model, optimizer), (other, again)):
        take_step(o, m, 2)
    assert_same_bits(tensors(model, optimizer), tensors(other, again))


@pytest.mark.parametrize("bad", ["3", None, [3.0], {"step": 3.0}, True])
def test_a_number_of_another_kind_is_refused_before_anything_moves(bad):
    model = net()
    optimizer = make("muon", model)
    take_step(optimizer, model, 0)
    state = optimizer.state_dict()
    index = next(index for index, values in state["state"].items() if "step" in values)
    state = {**state, "state": {**state["state"], index: {**state["state"][index], "step": bad}}}
    before, options = tensors(model, optimizer), str(optimizer.param_groups)
    with pytest.raises(lw.LayerwiseError, match=r"step of '.*' is .* in it and a Tensor here"):
        optimizer.load_state_dict(state)
    assert_same_bits(before, tensors(model, optimizer))
    assert options == str(optimizer.param_groups)
    take_step(optimizer, model, 1)


@pytest.mark.parametrize("bad", ["fast", None, [0.1]])
def test_a_rate_that_is_no_number_is_refused_before_anything_moves(bad):
    model = net()
    optimizer = make("muon", model)
    state = optimizer.state_dict()
    state["param_groups"][1]["lr"] = bad
    before = str(optimizer.param_groups)
    with pytest.raises(lw.LayerwiseError, match=r"lr is .* in it and 0\.0"):
        optimizer.load_state_dict(state)
    assert before == str(optimizer.param_groups)


@pytest.mark.parametrize("without", [{"adamw_nu": 1.0}, {"momentum_warmup": 0}])
def test_a_run_from_before_an_option_goes_on_without_it(without):
    model = net()
    old = lw.DualMuon(lw.param_groups(model), lr=0.01, **without)
    set_gradients(model, 0)
    old.step()
    saved = copy.deepcopy(old.state_dict())
    for group in saved["param_groups"]:
        if group.get("nu") == 1.0:  # what AdamW's groups had no word of
            del group["nu"]
    other = copy.deepcopy(model)
    new = lw.DualMuon(lw.param_groups(other), lr=0.01)
    new.load_state_dict(saved)
    for some, optimizer in ((model, old), (other, new)):
        set_gradients(some, 1)
        optimizer.step()
    assert_same_bits(tensors(model, old), tensors(other, new))
