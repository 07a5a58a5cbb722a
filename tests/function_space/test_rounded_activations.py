"""Layers that round what goes into them, as bitsandbytes' 8-bit ones: what a first order is of, what a small step does."""

import copy

import pytest
import torch
from torch import nn

from layerwise.function_space import function_space_rates


class EightBit(torch.autograd.Function):
    """`x W^T` of rows rounded to 255 levels each; the gradient goes through as if they were not."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        level = x.abs().amax(-1, keepdim=True) / 127
        return (x / level).round() * level @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


class Linear8bit(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x):
        return EightBit.apply(x, self.weight)


def own_layer():
    weight = torch.randn(64, 64) / 8
    return Linear8bit(weight), weight


def layer_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(torch.randn(64, 64) / 8, requires_grad=False, has_fp16_weights=False)
    layer.to("cpu")
    return layer, layer.weight.data.float() * layer.weight.SCB.float()[:, None] / 127


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [own_layer, layer_of_bitsandbytes])
def test_rates_are_those_of_the_forward_without_the_rounding_and_a_small_step_is_lost_in_it(make, seed):
    torch.manual_seed(seed)
    layer, weight = make()
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), layer, nn.Tanh(), nn.Linear(64, 3))
    plain = copy.deepcopy(model)
    plain[2] = nn.Linear(64, 64, bias=False)
    plain[2].weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(64, 8)
    update = {"0.weight": torch.randn(64, 8)}

    def rate(of, size, **how):
        step = {name: size * direction for name, direction in update.items()}
        return function_space_rates(of, step, x, **how)

    true = rate(plain, 1.0, method="exact")["0.weight"].value
    # Rounding moves activations, at which tanh is differentiated, by up to 1/254 of a row's largest, up or down; over 64
    # times 64 of them most of that averages out (found: 2e-4 at most, over three seeds).
    assert rate(model, 1.0, method="exact")["0.weight"].value == pytest.approx(true, rel=1e-3)
    estimated = rate(model, 1.0, probes=400)["0.weight"]
    assert estimated.value == pytest.approx(true, abs=4 * estimated.stderr)
    # What a step does in the forward that is run is rounding, for one that moves few activations across a level: the
    # fewer, the smaller the part of the first order (about with the step's root). The numbers stand in function-space.md.
    lost, small, moderate = (rate(model, size, method="difference") for size in (1e-5, 1e-3, 1e-2))
    assert 0.04 < lost["0.weight"].linearity < 0.1
    assert 0.5 < small["0.weight"].linearity < 0.8
    assert moderate["0.weight"].linearity == pytest.approx(1, abs=0.03)
    assert "lost in what the forward rounds" in str(lost)
    assert rate(plain, 1e-3, method="difference")["0.weight"].linearity == pytest.approx(1, abs=0.01)
