"""What the processes of a test cluster run: a small model, trained on the same global batches at any world size."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import layerwise as lw
from layerwise.optim.matrix_work import LocalWork

BATCH = 64  # at least every d_in, so that gradients have full rank
VOCABULARY = 19  # four processes hold 5, 5, 5 and 4 rows


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)  # fused: three units, and three in its bias
        self.up = nn.Linear(width, 18)  # not a multiple of four
        self.down = nn.Linear(18, width)
        self.gain = nn.Parameter(torch.ones(5))  # shards of 2, 2, 1 and 0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + torch.tanh(q) * torch.tanh(k) + v
        return x + self.down(torch.tanh(self.up(x))) * self.gain.sum()


class Model(nn.Module):
    """Two blocks and a matrix large enough that its noise is estimated (Lanczos) rather than computed."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.wide = nn.Linear(width, 70)
        self.square = nn.Linear(70, 66, bias=False)
        self.norm = nn.LayerNorm(66)
        self.head = nn.Linear(66, VOCABULARY)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        x = self.embedding(tokens) + features
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(self.square(torch.tanh(self.wide(x)))))


def make_model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().double()


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The global batch of a step: tokens, features, targets."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(VOCABULARY, (2, BATCH), generator=generator)
    return tokens[0], torch.randn(BATCH, 12, generator=generator, dtype=torch.float64), tokens[1]


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def distribute(model: Model, how: str) -> nn.Module:
    world = dist.get_world_size() if dist.is_initialized() else 1
    if how == "single":
        return model
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp":
        return shard(model, init_device_mesh("cpu", (world,)))
    assert how == "hsdp"
    return shard(model, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replica", "shard")))


RULES = {
    "none": None,
    "previous": lw.NoiseAdaptive(),
    "previous_bf16": lw.NoiseAdaptive(reference="previous_bf16"),
    "momentum": lw.NoiseAdaptive(reference="momentum"),
    "independent": lw.NoiseAdaptive(reference="independent"),
    "normalised": lw.NoiseAdaptive(size_normalised=True, anchor="mean"),
    "alpha": lw.NoiseAdaptive(alpha=0.1),
    "namo": lw.NormAdaptive(),
}
RATES = {"Muon": 0.02, "DMuon": 0.005, "Scion": 2**-11, "Signum": 0.002, "Lanton": 0.01}
SPLITS = {"blocks.*.qkv.*": 3}


def make_optimizer(model: nn.Module, preset: str, rule: str) -> lw.LayerwiseOptimizer:
    module = model.module if isinstance(model, DistributedDataParallel) else model
    options: dict[str, Any] = {"lr": RATES[preset], "noise": RULES[rule], "weight_decay": 0.1}
    return getattr(lw, preset)(lw.param_groups(module, splits=SPLITS), **options)


def mine(rows: Tensor) -> Tensor:
    """This process's part of a global (half) batch."""
    if not dist.is_initialized():
        return rows
    return rows.chunk(dist.get_world_size())[dist.get_rank()]


def backward(model: nn.Module, optimizer: lw.LayerwiseOptimizer, step: int) -> None:
    """Gradients of the global batch, in two halves where the noise rule wants them."""
    halves = any(getattr(group["noise"], "needs_halves", False) for group in optimizer.param_groups)
    parts = [half.chunk(2) if halves else (half,) for half in batch(step)]
    for i, (tokens, features, targets) in enumerate(zip(*parts, strict=True)):
        loss = nn.functional.cross_entropy(model(mine(tokens), mine(features)), mine(targets))
        (loss / len(parts[0])).backward()
        if halves and i == 0:
            optimizer.hold_half()


def train(model: nn.Module, optimizer: lw.LayerwiseOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, optimizer, step)
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def trained(how: str, preset: str, rule: str, steps: int = 20) -> dict[str, Any]:
    """Weights, noise and rates after some steps."""
    model = distribute(make_model(), how)
    optimizer = make_optimizer(model, preset, rule)
    if how == "single":
        optimizer.work = LocalWork()
    train(model, optimizer, range(steps))
    return {"weights": weights(model), "rates": dict(optimizer.layer_rates())}
