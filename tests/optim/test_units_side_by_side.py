"""A rule's numbers of all units are parts of one vector, which shows nowhere but in the time of a step."""

import copy
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import OPTIMIZERS, assert_same_bits, make, net, take_step, tensors, twin

import layerwise as lw
from layerwise.geometry import Spectral
from layerwise.optim.work.job import Lineup
from layerwise.optim.work.local import GRADIENTS, MatrixJob


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
        assert abs(found[name].squared_norm - rate.squared_norm) <= 1e-5 * rate.squared_norm  # sums come in another order


def test_a_group_that_grows_keeps_the_numbers_of_its_units():
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False) for _ in range(3)])
    model[1].weight.requires_grad_(False)
    optimizer = lw.Lanton(lw.param_groups(model))
    for seed in range(3):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
    before = {name: rate.squared_norm for name, rate in optimizer.layer_rates().items()}
    model[1].weight.requires_grad_(True)
    assert optimizer.add_trainable(model) == ["1.weight"]
    model[1].weight.grad = torch.randn(4, 4)
    for name in (0, 2):
        model[name].weight.grad = None
    optimizer.step()
    after = {name: rate.squared_norm for name, rate in optimizer.layer_rates().items()}
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


def small_layers(count=5, seed=0):
    torch.manual_seed(seed)
    return torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(count)])


def steps_of_layers(name, model, skip=lambda step, number: False):
    """Five steps; `skip` says which layers have no gradient at one."""
    optimizer = OPTIMIZERS[name](lw.param_groups(model))
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for half in range(2):
            for number, layer in enumerate(model):
                for p in layer.parameters():
                    grad = torch.randn(p.shape, generator=generator)
                    p.grad = None if skip(step, number) else grad
            if half == 0:
                optimizer.hold_half()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("skip", [lambda *_: False, lambda step, number: (step + number) % 3 == 0])
@pytest.mark.parametrize("name", ["muon", "dual-muon", "lanton", "lanton-bf16", "lanton-momentum", "namo"])
def test_a_step_of_small_parameters_side_by_side_is_the_step_of_each(name, skip, monkeypatch):
    together, apart = small_layers(), small_layers()
    first = steps_of_layers(name, together, skip)
    monkeypatch.setattr("layerwise.optim.work.job._SMALL", 0)
    second = steps_of_layers(name, apart, skip)
    assert_same_bits(tensors(together, first), tensors(apart, second))


def momentum(optimizer, model):
    return [optimizer.state[layer.weight]["momentum_buffer"] for layer in model[1:-1]]


def test_the_momentum_of_small_parameters_of_a_shape_is_one_tensor():
    model = small_layers()
    held = momentum(steps_of_layers("lanton", model), model)
    assert len({average.untyped_storage().data_ptr() for average in held}) == 1
    assert sum(average.untyped_storage().nbytes() for average in held[:1]) <= 5 * held[0].nbytes


@pytest.mark.parametrize("how", ["another tensor", "other memory"])
def test_momentum_that_was_put_elsewhere_is_used(how):
    models = [small_layers(), small_layers()]
    moved, written = (steps_of_layers("lanton", model) for model in models)
    for put, own in zip(momentum(moved, models[0]), momentum(written, models[1]), strict=True):
        own.fill_(0.25)
        if how == "other memory":  # as programs do that keep state on the host between steps
            put.data = torch.full_like(put, 0.25)
    if how == "another tensor":
        for layer in models[0][1:-1]:
            state = moved.state[layer.weight]
            state["momentum_buffer"] = torch.full_like(state["momentum_buffer"], 0.25)
    for model, optimizer in zip(models, (moved, written), strict=True):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert_same_bits(tensors(models[0], moved), tensors(models[1], written))


def test_no_gradient_is_kept_alive_between_steps():
    model = small_layers()
    optimizer = steps_of_layers("lanton", model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    held = [weakref.ref(p.grad) for p in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    assert all(reference() is None for reference in held)


def test_a_gradient_without_numbers_is_an_error_that_names_its_parameter():
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, device="meta")])
    optimizer = lw.Muon(lw.param_groups(model))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(lw.LayerwiseError, match=r"'1\.(weight|bias)' is on the meta device and has no numbers"):
        optimizer.step()


def test_state_of_small_parameters_is_saved_where_no_two_tensors_may_share_memory(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    state = steps_of_layers("lanton", small_layers()).state_dict()["state"]
    named = {f"{number}.{key}": value for number, held in state.items() for key, value in held.items()}
    files.save_file(named, tmp_path / "state.safetensors")
    assert_same_bits(files.load_file(tmp_path / "state.safetensors"), named)


def alternating(step, number):
    return step % 2 == 1 and number < 3


@pytest.mark.parametrize("skip", [lambda *_: False, alternating])
def test_state_that_was_joined_and_left_keeps_no_other_memory_alive(skip):
    model = small_layers(count=6)
    optimizer = steps_of_layers("lanton", model, skip)
    tensors_held = [value for state in optimizer.state.values() for value in state.values()]
    memory = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors_held}
    assert sum(memory.values()) == sum(value.nbytes for value in tensors_held)


@pytest.fixture
def times_planned(monkeypatch):
    made, make_anew = [], Lineup._make
    monkeypatch.setattr(Lineup, "_make", lambda *given: made.append(1) or make_anew(*given))
    return made


def with_momenta(model, optimizer, momenta):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for group, momentum in zip(optimizer.param_groups, momenta, strict=True):
        group["momentum"] = momentum
    optimizer.step()


def test_a_momentum_that_moves_plans_no_steps_anew(times_planned):
    model = small_layers()
    optimizer = lw.Lanton(lw.param_groups(model))
    count = len(optimizer.param_groups)
    for step in range(5):
        with_momenta(model, optimizer, [0.8 + 0.02 * step] * count)
    assert len(times_planned) == 1


def test_parameters_are_worked_on_together_while_their_momenta_are_the_same(times_planned):
    """Two groups of one shape: as two optimizers of a group each, whatever their momenta do."""
    model, other = small_layers(count=4), small_layers(count=4)
    both, *apart = (
        lw.Lanton(
            [{"params": [layers[i].weight for i in rows], "lr": 0.01} for rows in some],
            rates=None,
        )
        for layers, some in ((model, [(0, 1), (2, 3)]), (other, [(0, 1)]), (other, [(2, 3)]))
    )
    moves = [((0.9, 0.9), 1), ((0.8, 0.8), 0), ((0.8, 0.7), 1), ((0.9, 0.6), 0), ((0.9, 0.9), 1)]
    for momenta, planned in moves:
        times_planned.clear()
        with_momenta(model, both, momenta)
        assert len(times_planned) == planned
        for optimizer, momentum in zip(apart, momenta, strict=True):
            with_momenta(other, optimizer, [momentum])
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("count", "at_once", "sizes"), [(12, 5, [4, 4, 4]), (5, 5, [5]), (7, 3, [2, 2, 3]), (3, 1, [1, 1, 1])]
)
def test_batches_are_even_and_keep_the_order(count, at_once, sizes):
    jobs = [object() for _ in range(count)]
    pieces = MatrixJob(jobs, GRADIENTS, Spectral(), None).pieces(at_once)
    assert [len(piece.jobs) for piece in pieces] == sizes
    assert [job for piece in pieces for job in piece.jobs] == jobs
