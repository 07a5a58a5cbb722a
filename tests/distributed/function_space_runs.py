"""What the processes of a test cluster measure: the same updates on the same global batch at any world size."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_runs import batch, distribute, make_model, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import layerwise as lw
from layerwise.common.tensors import local_part, placed_as
from layerwise.function_space.measuring.fsdp import _groups

sys.path.append(str(Path(__file__).parents[1] / "function_space"))
from naive import NaiveFLeRM

# How a global batch of 64 rows is spread: evenly, or with ranks that have few or no rows.
SPREADS = {
    "even": {1: [64], 2: [32, 32], 4: [16, 16, 16, 16]},
    "uneven": {1: [64], 2: [61, 3], 4: [20, 0, 43, 1]},
}


def spread(tensors: tuple[Tensor, ...], how: str) -> tuple[Tensor, ...]:
    """This process's rows of some global tensors."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return tuple(tensor.split(SPREADS[how][world])[rank] for tensor in tensors)


def mask_of(rows: int = 64) -> Tensor:
    """Every third row counts, and none of the last quarter."""
    return (torch.arange(rows) % 3 == 0) & (torch.arange(rows) < 48)


def update_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) / 100 for name, p in model.named_parameters()}


def measured(how: str, method: str, rows: str = "even", masked: bool = False, **options: Any) -> lw.Rates:
    update = update_of(make_model())
    model = distribute(make_model(), how)
    tokens, features, _ = batch(0)
    inputs = spread((tokens, features), rows)
    mask = spread((mask_of(),), rows)[0] if masked else None
    return lw.function_space_rates(model, update, inputs, method=method, probes=9, mask=mask, **options)


class Forking(nn.Module):
    """A branch that only rows with positive first feature take: some processes never see it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rare, self.never = (nn.Linear(6, 6).double() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        some = x[:, 0] > 0
        return h.index_add(0, some.nonzero()[:, 0], self.rare(h[some])) if some.any() else h


def forked(method: str, memory: int, slices: int) -> lw.Rates:
    """Two rows a process at world size 4; only the last two take the branch."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 0] = torch.tensor([-1.0] * 6 + [1.0] * 2)
    model = Forking()
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    mine = x.chunk(world)[rank]
    return lw.function_space_rates(model, update_of(model), mine, method=method, probes=4, memory=memory, slices=slices)


OBSERVERS = {
    "recorder": functools.partial(lw.FunctionSpaceRecorder, every=1, probes=8),
    "full_cov": functools.partial(lw.FunctionSpaceRecorder, every=1, probes=8, method="full_cov"),
    "flerm": functools.partial(lw.FLeRM, base="uniform", every=2, probes=8),
    "difference": functools.partial(lw.FunctionSpaceRecorder, every=1, probes=8, method="exact", difference_every=2),
    "flerm on differences": functools.partial(lw.FLeRM, base="uniform", every=2, method="difference"),
}


def observed(how: str, observer: str, steps: int = 3) -> dict[str, Any]:
    """Some steps of AdamW, each measured or matched on another batch."""
    model = distribute(make_model(), how)
    # A large eps: entries with a gradient of rounding noise do not move by a whole step.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.1)
    watcher = OBSERVERS[observer](model, optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        *inputs, targets = spread(batch(step), "even")
        nn.functional.cross_entropy(model(*inputs), targets).backward()
        with watcher.step(tuple(spread(batch(100 + step)[:2], "uneven"))):
            optimizer.step()
    found: dict[str, Any] = {"weights": weights(model)}
    if isinstance(watcher, lw.FLeRM):
        return found | {"lrs": watcher.learning_rates(), "reports": watcher.reports}
    whole = [record.whole for record in watcher.records]
    return found | {"rates": [record.rates for record in watcher.records], "whole": whole}


def watched(how: str) -> list[dict[str, float]]:
    """The numbers of `lw.watch` over some steps of AdamW, measured in function space on a batch that is the same for all."""
    model = distribute(make_model(), how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.1)
    measured = batch(100)[:2]
    watch = lw.watch(model, optimizer, 2, function_space_every=4, batch=measured, part=1, method="exact")
    for step in range(4):
        optimizer.zero_grad()
        *inputs, targets = spread(batch(step), "even")
        nn.functional.cross_entropy(model(*inputs), targets).backward()
        optimizer.step()
    return [record.scalars() for record in watch.records]


class Noisy(nn.Module):
    """Dropout, BatchNorm, a buffer that is replaced, and a parameter that is not sharded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
        self.norm, self.drop, self.out = nn.BatchNorm1d(12), nn.Dropout(0.3), nn.Linear(12, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.out(self.drop(self.norm(x)))


def trace(how: str, watched: bool) -> dict[str, Tensor]:
    """All that a user could see after some steps with accumulated gradients."""
    model = distribute(Noisy(), how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = lw.FunctionSpaceRecorder(model, optimizer, every=1, probes=2)
    torch.manual_seed(3 + (dist.get_rank() if dist.is_initialized() else 0))
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(2):
            unsynced = model.no_sync() if how == "ddp" and not micro else nullcontext()
            if how == "fsdp":
                model.set_requires_gradient_sync(bool(micro))
            with unsynced:
                model(torch.randn(8, 12)).square().mean().backward()
        if how == "fsdp" and step == 1:
            model.set_requires_gradient_sync(False)  # as a loop may have it for the next accumulation
        if not watched:
            optimizer.step()
        else:
            with recorder.step(torch.ones(4, 12) * (step + 1)):
                optimizer.step()
    state = {f"w.{n}": local_part(p.detach()).clone() for n, p in model.named_parameters()}
    state |= {f"g.{n}": local_part(p.grad).clone() for n, p in model.named_parameters()}
    state |= {f"b.{n}": b.clone() for n, b in model.named_buffers()}
    state |= {"random": torch.get_rng_state(), "modes": torch.tensor([m.training for m in model.modules()])}
    if how == "fsdp":
        groups = [g for m in model.modules() if isinstance(m, FSDPModule) for g in _groups(m)]
        state["sync"] = torch.tensor([g.reduce_grads for g in groups])
    return state | {"measured": torch.tensor(len(recorder.records))}


class FirstInputs(nn.Module):
    """The model on one tensor, as the naive procedure calls it."""

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, features: Tensor) -> Tensor:
        return self.model(self.tokens, features)


def naive(how: str, probes: int) -> dict[str, float]:
    """The official procedure's rates, each process drawing for its own part of the batch."""
    tokens, features = spread(batch(0)[:2], "even")
    model = distribute(make_model(), how)
    update = update_of(make_model())
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=1.0)
    procedure = NaiveFLeRM(FirstInputs(model, tokens), optimizer, [], 1.0, method="full_cov", beta=1 - 1e-9)
    procedure.save_weights()
    with torch.no_grad():
        for p, delta in zip(model.parameters(), update.values(), strict=True):
            p.add_(delta)
    torch.manual_seed(100 + (dist.get_rank() if dist.is_initialized() else 0))
    for _ in range(probes):
        procedure.call(features, modify=False)
    return {name.removeprefix("model.").removeprefix("module."): rate for name, rate in procedure.delta.items()}


def naive_of_shards(how: str) -> dict[str, float]:
    """Its Kronecker rates where each process takes its shard for the whole tensor (of right gradients)."""
    model = distribute(make_model(), how)
    update = update_of(make_model())
    inputs = spread(batch(0)[:2], "even")
    procedure = NaiveFLeRM(nn.Module(), None, [], 1.0, beta=1 - 1e-9)
    scale = dist.get_world_size() if dist.is_initialized() else 1
    rates = {}
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        eps = torch.randn(64, 19, generator=generator, dtype=torch.float64)
        outputs = model(*inputs)
        outputs.backward(spread((eps,), "even")[0] / math.sqrt(eps.numel()))
        procedure.calls += 1
        for name, p in model.named_parameters():
            if name.endswith(("wide.weight", "up.weight")):
                delta = local_part(placed_as(update[name], p))
                rates[name] = math.sqrt(procedure.estimate(name, delta * local_part(p.grad) * scale))
            p.grad = None
    return rates


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except lw.LayerwiseError as error:
        return str(error)
    return ""


def tensor_parallel_rates() -> str:
    model = nn.Linear(6, 4)
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), ColwiseParallel())
    update = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    return _message(lambda: lw.function_space_rates(model, update, torch.ones(3, 6)))


class Halving(nn.Linear):
    """Writes its weight whenever it is read."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.mul_(0.5)
        return super().forward(x)


def weights_written(how: str, method: str, layer: type[nn.Linear] = nn.Linear) -> tuple[lw.Rates, float]:
    """Rates of a model whose embedding renormalises its weight, and how far measuring moved weights."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(11, 6, max_norm=1.0), nn.Flatten(), layer(24, 4)).double()
    model[0].weight.data.mul_(3)
    before, update = weights(model), update_of(model)
    if how == "fsdp":
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    inputs = spread((torch.arange(64 * 4).view(64, 4) % 11,), "even")[0]
    rates = lw.function_space_rates(model, update, inputs, method=method, probes=8)
    return rates, max(float((w - before[name]).abs().max()) for name, w in weights(model).items())


def refused_writer(method: str) -> str:
    return _message(lambda: weights_written("fsdp", method, Halving))


def unsynchronised() -> str:
    model = distribute(Noisy(), "fsdp")
    update = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    model.set_requires_gradient_sync(False)
    model(torch.ones(4, 12)).sum().backward()
    return _message(lambda: lw.function_space_rates(model, update, torch.ones(3, 12)))


def nothing_counts() -> str:
    model = nn.Linear(6, 4)
    update = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    return _message(lambda: lw.function_space_rates(model, update, torch.ones(3, 6), mask=torch.zeros(3, dtype=torch.bool)))


def checked_alone(seed: int | None = None) -> list[float]:
    """The rates that a process by itself finds in `lw.check`, on a batch that no other has."""
    torch.manual_seed(dist.get_rank() if seed is None else seed)
    own = torch.randn(8, 4), torch.randn(8, 2)
    result = lw.check(
        lambda width: nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2)),
        (4, 8),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        own,
        (1,),
        seeds=(0,),
        probes=4,
        processes=None,
    )
    return [value for trend in result.of("rate") for value in trend.values]
