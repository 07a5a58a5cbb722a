"""What the processes of a test cluster run to compare the noise between replicas with a literal twin on one process."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from distributed_runs import OVERRIDES, RATES, SPLITS, batch, distribute, make_model, mine, results
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import layerwise as lw
from layerwise.function_space import FunctionSpaceRecorder
from layerwise.geometry import Sign, Spectral
from layerwise.geometry.layout import MatrixLayout
from layerwise.optim.work.distributed import DistributedWork
from layerwise.optim.work.job import Deviation
from layerwise.optim.work.local import LocalWork
from layerwise.optim.work.placement import assign

HOOKS = {"": None, "allreduce": allreduce_hook, "fp16": fp16_compress_hook}
NOISE = lw.NoiseAdaptive(reference="replicas")


@dataclass(frozen=True)
class Case:
    how: str  # as in `distribute`; "own" is a loop over all replicas on one process
    clip: float = 0.0
    parts: int = 1  # backward passes that are accumulated
    synced: bool = False  # average after each of them, not only after the last
    partial: bool = False  # the first replica does not use the experts
    bucket_view: bool = False
    static: bool = False  # DDP's static_graph
    mixed: bool = False  # FSDP2 computes in bfloat16 and averages in float32
    hook: str = ""
    measured: bool = False  # function-space rates around each step: their probes are no gradients
    loss_scale: float = 1.0  # and gradients divided by it before the step, as a GradScaler does


def optimizer_of(model: nn.Module) -> lw.LayerwiseOptimizer:
    module = model.module if isinstance(model, DistributedDataParallel) else model
    groups = lw.param_groups(module, overrides=OVERRIDES, splits=SPLITS)
    return lw.Lanton(groups, lr=RATES["Lanton"], rates=NOISE, weight_decay=0.1)


def wrapped(case: Case) -> nn.Module:
    if case.mixed:
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return fully_shard(make_model(), mp_policy=half)
    if case.how != "ddp":
        return distribute(make_model(), case.how)
    return DistributedDataParallel(
        make_model(),
        bucket_cap_mb=0.01,  # several buckets, in another order after the first step
        find_unused_parameters=case.partial,
        gradient_as_bucket_view=case.bucket_view,
        static_graph=case.static,
    )


def loss_of(model: nn.Module, case: Case, step: int, part: int, replica: int, replicas: int) -> Tensor:
    """Of one replica's share of one part of the batch."""
    rows = [data.chunk(case.parts)[part].chunk(replicas)[replica] for data in batch(step)]
    module = model.module if isinstance(model, DistributedDataParallel) else model
    module.use_experts = not (case.partial and replica == 0)
    return nn.functional.cross_entropy(model(*rows[:2]), rows[2]) / case.parts


def unsynced(model: nn.Module, case: Case, part: int) -> Any:
    last = part == case.parts - 1
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last or case.synced else model.no_sync()
    model.set_requires_gradient_sync(last or case.synced)
    return nullcontext()


def watched(case: Case, steps: int) -> dict[str, Any]:
    """Train with each process's own gradients watched by hooks."""
    model = wrapped(case)
    optimizer = optimizer_of(model)
    optimizer.work = DistributedWork(bucket_bytes=4000)
    if case.how == "ddp" and case.hook:
        optimizer.watch_replicas(model, HOOKS[case.hook])
    else:
        optimizer.watch_replicas(model)
        optimizer.watch_replicas(model)  # once more does nothing
    recorder = FunctionSpaceRecorder(model, optimizer, every=1, probes=1) if case.measured else None
    held = 0
    for step in range(steps):
        model.zero_grad()  # as transformers' Trainer does it: not through the optimizer
        for part in range(case.parts):
            with unsynced(model, case, part):
                loss = loss_of(model, case, step, part, dist.get_rank(), dist.get_world_size())
                (loss * case.loss_scale).backward()
        for param in model.parameters():
            param.grad.div_(case.loss_scale)
        if case.clip:
            clip_grad_norm_(model.parameters(), case.clip)
        held = sum(kept.nbytes for kept in optimizer._second._replicas._kept.values())
        with recorder.step(tuple(mine(data) for data in batch(step)[:2])) if recorder else nullcontext():
            optimizer.step()
    return results(model, optimizer) | {"held": held}


class Literal:
    """In the place of the hooks: the gradients of all replicas, from which the definition follows word for word."""

    def __init__(self, optimizer: lw.LayerwiseOptimizer, replicas: int) -> None:
        self.params = [param for group in optimizer.param_groups for param in group["params"]]
        self.replicas = replicas
        self.turn = 0
        self.own: list[dict[Tensor, Tensor]] = []
        self.factor: Tensor | float = 1.0

    def deviations(self, named: Sequence[tuple[str, Tensor]], work: LocalWork) -> list[Deviation]:
        first = assign(tuple(param.numel() for param in self.params), self.replicas)
        whose = {p: (f + self.turn) % self.replicas for p, f in zip(self.params, first, strict=True)}
        return [Deviation(whose[p], self.replicas, self.own[whose[p]][p], self.factor) for _, p in named]

    def next_turn(self) -> None:
        self.turn += 1

    def forget(self) -> None:
        pass


def literal(case: Case, replicas: int, steps: int) -> dict[str, Any]:
    """The same training on one process: each replica's gradients one after the other, and their mean by hand."""
    model = make_model()
    optimizer = optimizer_of(model)
    optimizer.work = LocalWork()
    optimizer._second._replicas = twin = Literal(optimizer, replicas)
    for step in range(steps):
        twin.own = []
        for replica in range(replicas):
            model.zero_grad()
            for part in range(case.parts):
                loss_of(model, case, step, part, replica, replicas).backward()
            zero = torch.zeros_like
            twin.own.append({p: zero(p) if p.grad is None else p.grad.clone() for p in twin.params})
        for param in twin.params:
            param.grad = sum(own[param] for own in twin.own) / replicas
        if case.clip:
            before = clip_grad_norm_(model.parameters(), case.clip)
            twin.factor = torch.clamp(case.clip / (before + 1e-6), max=1.0)
        optimizer.step()
    return results(model, optimizer)


# ------------------------------------------------------------------------------------------------ gradients of noise


class Plain(nn.Module):
    """Whose gradients are what it is given."""

    def __init__(self, count: int, size: int = 64) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(size, size)) for _ in range(count)])

    def forward(self, gradients: Tensor) -> Tensor:
        return sum((w * g).sum() for w, g in zip(self.weights, gradients, strict=True))


def noise_of_noise(deviations: Sequence[float], rules: Sequence[tuple[str, str, float]], steps: int) -> list[float]:
    """The noise H of one matrix per rule, (reference, geometry, beta), on white noise of a deviation for each replica."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    model = DistributedDataParallel(Plain(len(rules)))
    groups = [
        {
            "params": [(f"weight.{i}", param)],
            "role": "hidden",
            "layout": MatrixLayout(),
            "geometry": {"sign": Sign(), "spectral": Spectral(nuclear="svd")}[geometry],
            "rates": lw.NoiseAdaptive(reference=reference, beta=beta),
        }
        for i, (param, (reference, geometry, beta)) in enumerate(zip(model.module.weights, rules, strict=True))
    ]
    optimizer = lw.Lanton(groups, lr=0.0)
    optimizer.watch_replicas(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(len(rules), 64, 64, generator=generator) * deviations[rank]).backward()
        optimizer.step()
    return [rate.squared_norm for rate in optimizer.layer_rates().values()]


# ------------------------------------------------------------------------------------------------- saving and errors


def resumed(skip: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Three steps, of which the first has a gradient that is not finite if `skip`; and the last again from a checkpoint."""
    case, ends = Case("ddp"), []
    rank, world = dist.get_rank(), dist.get_world_size()
    saved: tuple[Any, Any] | None = None
    for steps in (range(3), range(2, 3)):
        model = wrapped(case)
        optimizer = optimizer_of(model)
        optimizer.guard.policy = "skip"
        if saved is not None:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        optimizer.watch_replicas(model)
        for step in steps:
            if step == 2 and saved is None:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            optimizer.zero_grad()
            loss = loss_of(model, case, step, 0, rank, world)
            (loss * float("nan") if skip and step == 0 else loss).backward()
            optimizer.step()
        ends.append(results(model, optimizer) | {"skipped": optimizer.skipped_steps})
    return ends[0], ends[1]


def error_of(what: str) -> str:
    """The message where the replicas cannot be seen."""
    case = Case("ddp")
    model = make_model() if what in ("plain", "single") else wrapped(case)
    optimizer = optimizer_of(model)
    try:
        if what == "hook":
            model.register_comm_hook(None, allreduce_hook)
        if what == "local":
            optimizer.work = LocalWork()
        if what != "unwatched":
            optimizer.watch_replicas(model)
        if what == "unseen":
            for param in model.parameters():
                param.grad = torch.ones_like(param)
        else:
            loss_of(model, case, 0, 0, 0, 1).backward()
        optimizer.step()
    except lw.LayerwiseError as error:
        return str(error)
    return ""
