"""Small models, gradients without a backward pass, and the optimizers under test by name."""

from __future__ import annotations

import copy

import torch
from torch import nn

import layerwise as lw


class Net(nn.Module):
    """One parameter of every kind the presets tell apart: embedding, tall, wide, gains, biases, head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.down = nn.Linear(10, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, ids):
        hidden = self.embed(ids)
        return self.head(hidden + self.down(torch.relu(self.norm(self.up(hidden)))))


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)


def loss_of(model, seed=0):
    ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), ids.roll(1, 1).flatten())


def set_gradients(model, seed, scale=1.0, skip=()):
    """Random gradients, the same for the same seed whatever the model's dtype; none for the names in `skip`."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
        p.grad = None if name in skip else noise.to(p)


OPTIMIZERS = {
    "muon": lw.Muon,
    "d-muon": lw.DMuon,
    "d-muon-noise": lambda groups, **kw: lw.DMuon(groups, rates=lw.NoiseAdaptive(), **kw),
    "dual-muon": lw.DualMuon,
    "scion-dual": lambda groups, **kw: lw.Scion(groups, rates=lw.DualNormAdaptive(), **kw),
    "namo": lambda groups, **kw: lw.DMuon(groups, rates=lw.NormAdaptive(), **kw),
    "scion": lw.Scion,
    "signum": lw.Signum,
    "static": lambda groups, **kw: lw.Lanton(groups, rates=lw.StaticRates({"up.weight": 0.5}), **kw),
    "lanton": lw.Lanton,
    "lanton-bf16": lambda groups, **kw: lw.Lanton(groups, rates=lw.NoiseAdaptive(reference="previous_bf16"), **kw),
    "lanton-momentum": lambda groups, **kw: lw.Lanton(groups, rates=lw.NoiseAdaptive(reference="momentum", alpha=1.0), **kw),
    "lanton-independent": lambda groups, **kw: lw.Lanton(groups, rates=lw.NoiseAdaptive(reference="independent"), **kw),
}


def make(name, model, **options):
    return OPTIMIZERS[name](lw.param_groups(model), **options)


def take_step(optimizer, model, seed, **gradients):
    """One step on the gradients of `seed`, shown as two halves to those that want them."""
    set_gradients(model, seed + 1000, scale=0.5, **gradients)
    optimizer.zero_grad()
    set_gradients(model, seed + 1000, scale=0.5, **gradients)
    optimizer.hold_half()
    set_gradients(model, seed, **gradients)
    optimizer.step()


def tensors(model, optimizer):
    """Every number a step could change, copied."""
    names = {p: name for name, p in model.named_parameters()}
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p, state in optimizer.state.items():
        found |= {f"{names[p]}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def assert_same_bits(before, after, but=()):
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.rpartition(".")[2] not in but:
            assert value.dtype == after[name].dtype, name
            assert torch.equal(_bits(value), _bits(after[name])), name


def _bits(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


def twin(model):
    return copy.deepcopy(model)
