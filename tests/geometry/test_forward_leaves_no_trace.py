"""A look at a model changes nothing in it, costs two forward passes at most, and works through wrappers."""

import copy
import random
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

import layerwise as lw
from layerwise.geometry import describe, param_groups
from layerwise.geometry.forward.addresses import AddressSpace

D = 8


class Body(nn.Module):
    """Everything that a forward pass may change: buffers, random numbers, weights, attributes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, D, max_norm=0.5)
        self.norm = nn.BatchNorm1d(D)
        self.mix = nn.Linear(D, 2 * D)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(D, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0
        self.aux = nn.Linear(D, 2)

    def forward(self, ids):
        self.calls += 1
        self.cached = self.embed(ids)
        self.seen.add_(1)
        x = self.norm(self.cached.transpose(1, 2)).transpose(1, 2)
        gate, up = self.mix(x + torch.rand(())).chunk(2, -1)
        x = self.drop(F.silu(gate) * up)
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def ids():
    return torch.arange(12).view(3, 4) % 11


def test_nothing_of_the_model_or_of_torch_changes():
    torch.manual_seed(0)
    model = Body()
    model.drop.eval()
    model.norm.train()
    model.mix.weight.grad = torch.ones(2 * D, D)
    hooked = []
    model.head.register_forward_hook(lambda *_: hooked.append(1))
    before = copy.deepcopy(model.state_dict())
    versions = {name: t._version for name, t in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    rows = {row.name: row for row in describe(model, ids()).rows}
    assert str(rows["mix.weight"].layout) == "out,in gate|up"
    assert {name for name, row in rows.items() if row.role == "head"} == {"head.weight", "aux.weight"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: t._version for name, t in model.state_dict(keep_vars=True).items()} == versions
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model.mix.weight.grad, torch.ones(2 * D, D))
    assert (model.calls, hasattr(model, "cached"), model.embed.max_norm) == (0, False, 0.5)
    assert len(model.head._forward_hooks) == 1
    assert all(p.grad is None for name, p in model.named_parameters() if name != "mix.weight")


def test_a_look_is_one_forward_pass_and_a_second_where_something_was_not_seen():
    calls = []

    def forward(model, batch):
        calls.append(model.training)
        assert not torch.is_grad_enabled()
        return model(batch)

    model = Body()
    describe(model, ids(), forward=forward)
    assert calls == [False, True]
    model.aux.requires_grad_(False)
    describe(model, ids(), forward=forward)
    assert calls[2:] == [False]


def test_functions_that_run_others_as_one_operation_leave_roles_to_the_modules():
    model = Body()
    text = str(describe(model, ids(), forward=lambda m, x: torch.cond(x.sum() > 0, m, m, (x,))))
    assert "cond runs functions that cannot be followed" in text


def test_an_error_in_the_model_restores_it_and_leaves_roles_to_the_modules():
    model = Body().train()
    text = str(describe(model, torch.tensor([[99]])))
    assert "the model did not run on the batch (IndexError" in text
    assert model.training
    assert "roles are those of the modules" in text
    with pytest.warns(UserWarning, match="did not run on the batch"):
        groups = param_groups(model, torch.tensor([[99]]))
    assert {name for group in groups for name, _ in group["params"]} == set(dict(model.named_parameters()))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.blocks = nn.ModuleList(Gated() for _ in range(2))
        self.head = nn.Linear(D, 11)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.both, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x):
        gate, up = self.both(self.norm(x)).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def compiled_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    return model


def compiled_in_place(model):
    for block in model.blocks:
        block.compile(backend="eager")
    return model


def checkpointed(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled blocks": compiled_blocks,
    "blocks compiled in place": compiled_in_place,
    "checkpointed blocks": checkpointed,
    "on the meta device": lambda model: model.to("meta"),
    "bfloat16": lambda model: model.bfloat16(),
    "float64": lambda model: model.double(),
    "frozen": lambda model: model,
}


def stored(model, batch=None):
    return [(row.name, row.role, str(row.layout), row.how) for row in describe(model, batch).rows]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_have_the_roles_and_names_of_the_plain_one(wrapper):
    expected = stored(Blocks(), ids())
    assert ("blocks.1.both.weight", "hidden", "out,in gate|up", "forward") in expected
    assert stored(WRAPPERS[wrapper](Blocks()), ids()) == expected


def test_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stored(Blocks(), ids()) == stored(Blocks(), ids())


def test_under_ddp_and_fsdp2(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    expected = stored(Blocks(), ids())
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert stored(DistributedDataParallel(Blocks()), ids()) == expected
        model = Blocks()
        for block in model.blocks:
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert stored(model, ids()) == expected
        optimizer = lw.Lanton(param_groups(model, ids()), lr=1e-3)
        model(ids()).sum().backward()  # and the model trains on as before
        optimizer.step()
        assert type(model.head.weight).__name__ == "DTensor"
    finally:
        destroy_process_group()


def test_patterns_and_groups_go_by_names_without_wrappers():
    model = torch.compile(checkpointed(Blocks()), backend="eager")
    groups = param_groups(model, ids(), overrides={"blocks.*.both.weight": {"lr": 0.5}})
    (group,) = [group for group in groups if group.get("lr") == 0.5]
    assert [name for name, _ in group["params"]] == ["blocks.0.both.weight", "blocks.1.both.weight"]


def test_one_warning_counts_the_doubts_and_a_batch_answers_them():
    class Unsure(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(D, D))
            self.head = nn.Linear(D, 3)

        def forward(self, x):
            return self.head(x @ self.table)

    with pytest.warns(UserWarning, match="the roles of 1 parameters are not certain") as caught:
        param_groups(Unsure())
    assert len(caught) == 1
    row = describe(Unsure(), torch.zeros(2, D)).rows[0]
    assert (str(row.layout), row.how, row.note) == ("in,out", "forward", "")
    assert describe(Unsure()).rows[0].how == "assumed"


@pytest.mark.parametrize("shape", [(1, 4), (3, 16)])
def test_what_is_followed_is_as_small_as_the_weights_whatever_the_batch(shape, monkeypatch):
    """Fewer keys than queries, a cache of keys that begins empty: copies that could write rows out token by token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation="sdpa"))
    followed = []
    by_owner = AddressSpace.by_owner
    monkeypatch.setattr(AddressSpace, "by_owner", lambda space, rows: followed.append(rows.numel()) or by_owner(space, rows))
    describe(model, {"input_ids": torch.ones(shape, dtype=torch.int64)})
    assert max(followed) == 24


@torch.no_grad()
def weight_normalised(m):
    m.mix.weight.copy_(F.normalize(m.mix.weight, dim=1))


@torch.no_grad()
def weight_changed_in_training(m):
    if m.training:
        m.mix.weight.mul_(0.5)


def part_of_a_weight(m):
    m.mix.weight.detach()[0].zero_()


def data_replaced(m):
    m.mix.weight.data = m.mix.weight.data * 2


def data_clamped(m):
    m.mix.weight.data.clamp_(0.0, 0.1)


def parameter_replaced(m):
    m.mix.weight = nn.Parameter(m.mix.weight * 2)


def gradient_zeroed(m):
    m.mix.weight.grad.zero_()


def gradient_dropped(m):
    m.mix.weight.grad = None


def frozen_and_hooked(m):
    m.mix.weight.requires_grad_(False)
    m.mix.register_forward_hook(lambda *_: None)


def kept_in_containers(m):
    m.log.append(1)
    m.log[0] = 2
    m.counts["calls"] = 1


def other_random_numbers(m):
    random.random(), np.random.rand(), torch.rand(1, generator=m.generator)


CHANGES = (
    *(weight_normalised, weight_changed_in_training, part_of_a_weight, data_replaced, data_clamped),
    *(parameter_replaced, gradient_zeroed, gradient_dropped),
    *(frozen_and_hooked, kept_in_containers, other_random_numbers),
)


class Changing(Body):
    def __init__(self, change):
        super().__init__()
        self.change, self.log, self.counts, self.generator = change, [0], {}, torch.Generator()
        self.mix.weight.grad = torch.ones(2 * D, D)

    def forward(self, ids):
        self.change(self)
        return super().forward(ids)


def everything_of(model):
    tensors = {name: (p, p.data_ptr(), p._version, p.requires_grad) for name, p in model.named_parameters()}
    values = [*(p.detach().clone() for p in model.parameters()), model.mix.weight.grad.clone()]
    states = random.getstate(), np.random.get_state()[1].tolist(), model.generator.get_state().tolist()
    own = model.log.copy(), model.counts.copy(), len(model.mix._forward_hooks)
    return tensors, [value.tolist() for value in values], states, own


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_forward_pass_changes_is_put_back(change):
    """Both passes: one part of the model is there in training only."""
    model = Changing(change)
    before = everything_of(model)
    text = str(describe(model, ids()))
    assert "did not run" not in text
    assert everything_of(model) == before


@pytest.mark.parametrize("pair", [tuple, list])
def test_a_loaders_pair_shows_what_its_inputs_alone_do(pair):
    """Targets were given to `forward` as well, which failed, and roles were those of the modules."""
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 3))
    x, y = torch.randn(5, D), torch.randint(0, 3, (5,))
    assert str(describe(model, pair((x, y)))) == str(describe(model, x))
    assert {row.how for row in describe(model, pair((x, y))).rows} == {"forward"}


def test_a_batch_of_dicts_in_one_argument_is_no_override():
    class Nested(nn.Linear):
        def forward(self, batch):
            return super().forward(batch["x"])

    [weight, _] = describe(Nested(D, 3), {"batch": {"x": torch.randn(2, D)}}).rows
    assert (weight.role, weight.how) == ("head", "forward")


class Nested(nn.Linear):
    """Its one argument is a dict, as of sentence-transformers' modules."""

    def forward(self, features):
        return super().forward(features["x"])


@pytest.mark.parametrize("model", [nn.Linear(D, 3), Nested(D, 3)], ids=["keywords", "one argument"])
def test_what_a_tokenizer_returns_is_a_batch(model):
    """transformers' `BatchEncoding` is a `UserDict`, which was taken for overrides."""
    key = "x" if isinstance(model, Nested) else "input"
    [weight, _] = describe(model, UserDict({key: torch.randn(2, D)})).rows
    assert (weight.role, weight.how) == ("head", "forward")


def test_overrides_may_be_such_a_mapping_too():
    [weight, _] = describe(nn.Linear(D, 3), UserDict({"weight": {"role": "hidden"}})).rows
    assert weight.role == "hidden"
