"""Frozen quantised layers, as bitsandbytes makes them: packed tensors of a class of their own that carry their state."""

import pytest
import torch
from torch import nn

import layerwise as lw


class Packed(nn.Parameter):
    """Two 4-bit numbers in each byte, `[rows * columns / 2, 1]`, with what unpacks them beside, as `Params4bit`."""

    @classmethod
    def of(cls, weight):
        scale = float(weight.detach().abs().max() / 7)
        whole = ((weight.detach() / scale).round() + 8).to(torch.uint8).flatten()
        packed = cls(((whole[::2] << 4) | whole[1::2]).unsqueeze(1), requires_grad=False)
        packed.quant_state = {"scale": scale, "shape": tuple(weight.shape)}
        return packed


class Product(torch.autograd.Function):
    """No operation of torch's sees the packed weight as a matrix."""

    @staticmethod
    def forward(ctx, x, packed):
        data, state = packed.detach(), packed.quant_state
        pairs = torch.cat([data >> 4, data & 15], dim=1).flatten()
        ctx.weight = (pairs.float() - 8).mul(state["scale"]).reshape(state["shape"])
        return x @ ctx.weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight, None


class Linear4bit(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = Packed.of(linear.weight)

    def forward(self, x):
        return Product.apply(x, self.weight)


class Linear4bitOnCPU(Linear4bit):
    """In evaluation mode without gradients bitsandbytes packs the weight anew for AVX512, and that stays."""

    def forward(self, x):
        if not self.training and not x.requires_grad:
            self.weight.data = self.weight.data.flip(0)
            self.weight.quant_state["packed for CPU"] = True
        return super().forward(x)


class Linear8bit(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max() / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


class Adapted(nn.Module):
    """A layer of peft's: the base, and two factors beside it."""

    def __init__(self, base, width, rank=2):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, width, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Model(nn.Module):
    def __init__(self, kind, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, width)
        self.embed.requires_grad_(False)
        self.layers = nn.ModuleList(Adapted(kind(nn.Linear(width, width)), width) for _ in range(2))
        self.head = nn.Linear(width, 11)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize("kind", [Linear4bit, Linear4bitOnCPU, Linear8bit])
@pytest.mark.parametrize("with_batch", [True, False])
def test_adapters_on_frozen_quantised_layers_have_their_roles_and_are_trained(kind, with_batch):
    model = Model(kind).eval()  # as from_pretrained gives it
    ids = torch.arange(11)
    before = [(p.detach().clone(), getattr(p, "quant_state", None)) for p in model.parameters()]
    groups = lw.param_groups(model, ids if with_batch else None)
    roles = {name: group["role"] for group in groups for name, _ in group["params"]}
    assert roles == {
        **{f"layers.{i}.lora_{side}.default.weight": f"lora_{side}" for i in (0, 1) for side in "AB"},
        "head.weight": "head",
        "head.bias": "vector",
    }
    for p, (was, state) in zip(model.parameters(), before, strict=True):  # looking has changed nothing
        assert torch.equal(p, was)
        assert getattr(p, "quant_state", None) is state
        assert "packed for CPU" not in (state or ())
    optimizer = lw.Lanton(groups, lr=1e-2)
    model.train()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids), ids)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for p, (was, _) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was) == (not p.requires_grad)
    assert len(lw.describe(model, ids).frozen) == 3


def test_measurements_and_distances_pack_no_weight_anew():
    model, ids = Model(Linear4bitOnCPU).eval(), torch.arange(11)  # as from_pretrained gives it
    state, was = model.layers[0].base_layer.weight.quant_state, model.layers[0].base_layer.weight.detach().clone()
    update = {"layers.0.lora_B.default.weight": torch.ones(8, 2)}
    assert lw.function_space_rates(model, update, ids, method="difference")["layers.0.lora_B.default.weight"].value > 0
    assert lw.layer_decay(model, 0.5, ids)
    assert torch.equal(model.layers[0].base_layer.weight, was)
    assert "packed for CPU" not in state
