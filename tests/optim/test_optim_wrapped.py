"""Optimizers inside what others wrap around them (SAM, schedule-free, fastai), and models that adapters were put into."""

import warnings

import pytest
import torch
from tiny import assert_same_bits, loss_of, make, net, tensors
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

import layerwise as lw
from layerwise.common.parameter_names import unwrap_optimizer


class Keeps:
    """As fastai's OptimWrapper (`opt`) and schedule-free's wrapper (`base`): no torch optimizer themselves."""

    def __init__(self, optimizer):
        self.opt = optimizer


class SAM(Optimizer):
    """Sharpness-aware minimisation as its users copy it (Foret et al., arXiv 2010.01412)."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def climb(self):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        length = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / length))
        self.zero_grad()

    @torch.no_grad()
    def descend(self):
        for p, state in self.state.items():
            p.copy_(state["old"])
        self.base_optimizer.step()
        self.zero_grad()


def sam_step(model, sam, seed):
    loss_of(model, seed).backward()
    sam.climb()
    loss_of(model, seed).backward()
    sam.descend()


def test_a_wrapper_is_looked_through_whatever_it_calls_its_optimizer():
    model = net()
    optimizer = make("dual-muon", model)
    assert unwrap_optimizer(Keeps(optimizer)) is optimizer
    assert lw.layer_rates(Keeps(optimizer)).keys() == optimizer.layer_rates().keys()
    with pytest.raises(lw.LayerwiseError, match=r"optimizer is Keeps: pass a torch\.optim\.Optimizer"):
        unwrap_optimizer(Keeps(None))


def test_an_optimizer_that_keeps_one_of_a_part_of_its_parameters_is_not(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = ZeroRedundancyOptimizer(net().parameters(), torch.optim.AdamW, lr=1e-3)
        sharded.optim.param_groups[0]["params"].pop()  # as another process's
        assert unwrap_optimizer(sharded) is sharded
    finally:
        torch.distributed.destroy_process_group()


def test_a_watch_sees_the_steps_of_sam_and_changes_none():
    model, watched = net(), net()
    sams = [SAM(lw.param_groups(each), lw.DualMuon, lr=0.01) for each in (model, watched)]
    watch = lw.watch(watched, sams[1], every=1)
    for seed in range(3):
        sam_step(model, sams[0], seed)
        sam_step(watched, sams[1], seed)
    assert [record.step for record in watch.records] == [1, 2, 3]
    assert lw.layer_rates(sams[1]) == sams[1].base_optimizer.layer_rates()
    assert_same_bits(dict(model.named_parameters()), dict(watched.named_parameters()))


def test_what_a_wrapper_keeps_in_the_state_is_saved_and_loaded():
    model, resumed = net(), net(seed=1)
    optimizer, other = make("dual-muon", model), make("dual-muon", resumed)
    loss_of(model).backward()
    optimizer.step()
    for p in model.parameters():  # as schedule-free's z
        optimizer.state[p]["z"] = torch.randn_like(p)
        optimizer.state[p]["turns"] = [1, 2]
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["z"], other.state[q]["z"])
        assert optimizer.state[p]["z"] is not other.state[q]["z"]
        assert other.state[q]["turns"] == [1, 2]
    resumed.load_state_dict(model.state_dict())
    for each, theirs in ((model, optimizer), (resumed, other)):
        theirs.zero_grad()
        loss_of(each, 1).backward()
        theirs.step()
    assert_same_bits(tensors(model, optimizer), tensors(resumed, other))


def test_what_a_wrapper_kept_does_not_hide_that_a_rule_is_another():
    model = net()
    with pytest.raises(lw.LayerwiseError, match="rates of 'up"):
        make("d-muon", net()).load_state_dict(make("dual-muon", model).state_dict())


class Adapted(nn.Module):
    """A linear layer as peft makes it: the old weight frozen inside, two factors beside it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def adapt(model):
    model.requires_grad_(False)
    model.up, model.head = Adapted(model.up), Adapted(model.head)
    return model


def test_an_optimizer_of_which_all_is_frozen_says_so_once_and_what_the_model_trains():
    model = net()
    optimizer = make("dual-muon", model)
    adapt(model)
    loss_of(model).backward()
    with pytest.warns(
        UserWarning, match=r"trains nothing: .* frozen now\. The model trains 'up\.lora_A\.weight'.* after get_peft"
    ):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        assert "up.lora_A.weight" in optimizer.add_trainable(model)
        optimizer.step()


def test_an_optimizer_of_a_part_that_is_trained_says_nothing():
    model = net()
    model.embed.requires_grad_(False)
    optimizer = make("dual-muon", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in (model.up, model.norm):
            part.requires_grad_(False)
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()  # without any gradient, which is the user's business


def test_flattened_matrices_are_told_with_what_to_use():
    model = net()
    optimizer = make("dual-muon", model)
    for group in optimizer.param_groups:  # as DeepSpeed's ZeRO does
        group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]
        group["param_names"] = group["param_names"][:1]
    with pytest.raises(lw.LayerwiseError, match=r"'up\.weight'.*\(\d+,\)\. Was it flattened\? DeepSpeed.*use FSDP2"):
        optimizer.step()


def test_a_tensor_of_another_shape_is_not_said_to_be_flattened():
    model = net()
    optimizer = make("dual-muon", model)
    model.up.weight.data = torch.zeros(2, 3, 4)
    with pytest.raises(
        lw.LayerwiseError, match=r"'up\.weight': MatrixLayout holds tensors of shape \[out, in\], not \(2, 3, 4\)$"
    ):
        optimizer.step()


class ScheduleFreeWrapper(Keeps):
    """By its name."""


def test_a_wrapper_that_averages_weights_is_not_matched():
    model = net()
    with pytest.raises(lw.LayerwiseError, match="averages weights over the run"):
        lw.FLeRM(model, ScheduleFreeWrapper(make("dual-muon", model)))
    lw.FLeRM(model, Keeps(make("dual-muon", model)))
