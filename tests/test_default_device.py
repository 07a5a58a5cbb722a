"""Everything runs under `torch.set_default_device("cuda")`, where what is made without a device is not on the host.

The meta device stands for it: what is made there in the place of numbers has none, so that nothing can be read from it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import layerwise as lw


class Network(nn.Module):
    """An embedding, a fused projection whose parts have to be found, a grouped convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv, self.norm = nn.Embedding(12, 16), nn.Linear(16, 48), nn.LayerNorm(16)
        self.mix, self.head = nn.Conv1d(16, 16, 3, padding=1, groups=4), nn.Linear(16, 12, bias=False)

    def forward(self, words):
        x = self.table(words)
        x = x + functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))
        return self.head(self.norm(x + self.mix(x.mT).mT))


@pytest.fixture
def case():
    """A model, words, and everything that is made from then on without a device on another one."""
    generator = torch.Generator().manual_seed(0)
    model, words = Network(), torch.randint(12, (8, 6), generator=generator)
    with torch.device("meta"):
        yield model, words


def backward(model, words):
    functional.cross_entropy(model(words).flatten(0, 1), words.flatten()).backward()


def test_roles(case):
    model, words = case
    rows = {row.name: (row.role, str(row.layout)) for row in lw.describe(model, words).rows}
    assert rows["qkv.weight"] == ("hidden", "out,in q|k|v")
    assert rows["head.weight"] == ("head", "out,in")


@pytest.mark.parametrize("preset", [lw.DualMuon, lw.Lanton, lw.Scion])
def test_optimizers(case, preset):
    model, words = case
    optimizer = preset(lw.param_groups(model, words))
    for _ in range(2):
        before = model.qkv.weight.clone()
        backward(model, words)
        optimizer.step()
        assert not torch.equal(before, model.qkv.weight)
    assert optimizer.layer_rates()["qkv.weight[q]"].lr > 0


@pytest.mark.parametrize("method", ["full_cov", "exact", "difference"])
def test_function_space(case, method):
    model, words = case
    update = {name: 0.01 * p.detach() for name, p in model.named_parameters()}
    rates = lw.function_space_rates(model, update, words, method=method)
    with torch.device("cpu"):
        assert str(rates) == str(lw.function_space_rates(model, update, words, method=method))


def test_a_watch_and_flerm(case):
    model, words = case
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, flerm = lw.watch(model, optimizer, every=1, function_space_every=2), lw.FLeRM(model, optimizer)
    for _ in range(2):
        backward(model, words)
        with flerm.step(words):
            optimizer.step()
    assert watch.records[-1].together is not None
    assert len(flerm.reports) == 1
