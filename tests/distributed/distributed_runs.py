"""What the processes of a test cluster run: a small model, trained on the same global batches at any world size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import layerwise as lw
from layerwise.errors import LayerwiseError
from layerwise.geometry import Spectral
from layerwise.geometry.layout import MatrixLayout, StackLayout
from layerwise.geometry.split import Split
from layerwise.optim.work.distributed import DistributedWork
from layerwise.optim.work.job import local_part
from layerwise.optim.work.local import LocalWork

LAYOUT = {"role": "hidden", "layout": MatrixLayout(), "geometry": Spectral()}

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
        self.use_experts = True
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.experts = nn.Parameter(torch.randn(5, 8, width) / width)  # 2, 2, 1 and 0 whole matrices
        self.wide = nn.Linear(width, 70)
        self.square = nn.Linear(70, 66, bias=False)
        self.norm = nn.LayerNorm(66)
        self.head = nn.Linear(66, VOCABULARY)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        x = self.embedding(tokens) + features
        for block in self.blocks:
            x = block(x)
        if self.use_experts:
            gate, up = torch.einsum("koi,bi->bko", self.experts, x).chunk(2, dim=-1)
            x = x + nn.functional.pad((torch.tanh(gate) * up).sum(1), (0, x.shape[1] - 4))
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
    for block in getattr(model, "blocks", ()):
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
    "dual": lw.DualNormAdaptive(),
}
RATES = {"Muon": 0.02, "DMuon": 0.005, "DualMuon": 0.005, "Scion": 2**-11, "Signum": 0.002, "Lanton": 0.01}
OVERRIDES = {"experts": {"role": "experts", "layout": StackLayout(Split.equal("gate", "up"))}}
SPLITS: dict[str, int] = {"blocks.*.qkv.*": 3}


def make_optimizer(model: nn.Module, preset: str, rule: str) -> lw.LayerwiseOptimizer:
    options: dict[str, Any] = {"lr": RATES[preset], "rates": RULES[rule], "weight_decay": 0.1}
    return getattr(lw, preset)(lw.param_groups(model, overrides=OVERRIDES, splits=SPLITS), **options)


def mine(rows: Tensor) -> Tensor:
    """This process's part of a global (half) batch."""
    if not dist.is_initialized():
        return rows
    return rows.chunk(dist.get_world_size())[dist.get_rank()]


def backward(model: nn.Module, optimizer: lw.LayerwiseOptimizer, step: int) -> None:
    """Gradients of the global batch, in two halves where the noise rule wants them."""
    halves = any(group["rates"] and group["rates"].needs_halves for group in optimizer.param_groups)
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


def make(how: str, preset: str = "Lanton", rule: str = "previous") -> tuple[nn.Module, lw.LayerwiseOptimizer]:
    model = distribute(make_model(), how)
    return model, make_optimizer(model, preset, rule)


def results(model: nn.Module, optimizer: lw.LayerwiseOptimizer) -> dict[str, Any]:
    return {"weights": weights(model), "rates": dict(optimizer.layer_rates())}


def trained(how: str, preset: str, rule: str, steps: int, bucket_bytes: int = 4000) -> dict[str, Any]:
    """Weights, noise and rates after some steps; the small buckets make many rounds."""
    model, optimizer = make(how, preset, rule)
    if how != "single":
        optimizer.work = DistributedWork(bucket_bytes=bucket_bytes)
    train(model, optimizer, range(steps))
    return results(model, optimizer)


def sharded_after(steps: int) -> dict[str, Any]:
    """As accelerate does for FSDP2: the model is sharded after its optimizer was made, which gets the new parameters."""
    model = make_model()
    optimizer = make_optimizer(model, "Lanton", "previous")
    names = {param: name for name, param in model.named_parameters()}
    places = [[names[param] for param in group["params"]] for group in optimizer.param_groups]
    sharded = dict(distribute(model, "fsdp").named_parameters())
    for group, held in zip(optimizer.param_groups, places, strict=True):
        group["params"] = [sharded[name] for name in held]
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(steps))
    return results(model, optimizer)


def sharded_unseen(steps: int) -> dict[str, Any]:
    """The model is sharded after its optimizer was made, and nobody tells the optimizer."""
    model = make_model()
    optimizer = make_optimizer(model, "Lanton", "previous")
    distribute(model, "fsdp")
    train(model, optimizer, range(steps))
    return results(model, optimizer)


def sharded_in_training(steps: int) -> dict[str, Any]:
    """The model is sharded after some steps under DDP, and nobody tells the optimizer: its state is cut as the model is."""
    model = make_model()
    optimizer = make_optimizer(model, "Lanton", "previous")
    train(distribute(model, "ddp"), optimizer, range(steps // 2))
    distribute(model, "fsdp")
    train(model, optimizer, range(steps // 2, steps))
    return results(model, optimizer)


def moved_between_whole_and_shards(steps: int, strict: bool) -> dict[str, Any]:
    """A state of whole tensors goes into an optimizer of shards and back, by `load_state_dict` alone."""
    model = make_model()
    optimizer = make_optimizer(model, "Lanton", "previous")
    train(distribute(model, "ddp"), optimizer, range(1))
    for step, how in enumerate(("fsdp", "ddp"), start=1):
        values, before = weights(model), optimizer.state_dict()
        model = make_model(seed=9)
        model.load_state_dict(values)
        running = distribute(model, how)
        optimizer = make_optimizer(model, "Lanton", "previous")
        optimizer.load_state_dict(before, strict=strict)
        train(running, optimizer, range(step, step + 1 if how == "fsdp" else steps))
    return results(model, optimizer)


def saved(how: str, folder: str, steps: range, load: bool) -> dict[str, Any]:
    """Train for some steps, from the checkpoint in ``folder`` if ``load``, and save there; what the model is then."""
    model, optimizer = make(how)
    if load:
        module_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": module_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    keys = {name: sorted(optimizer.state[p]) for name, p in model.named_parameters()}
    train(model, optimizer, steps)
    module_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": module_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return results(model, optimizer) | {"keys": keys}


def saved_whole(how: str, file: str, steps: range) -> None:
    """Train under ``how`` and save one ordinary file of whole tensors."""
    model, optimizer = make(how)
    train(model, optimizer, steps)
    whole_state = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=whole_state)
    if dist.get_rank() == 0:
        torch.save({"model": model_state, "optimizer": optimizer_state}, file)
    dist.barrier()


def loaded_whole(how: str, file: str, steps: range) -> dict[str, Any]:
    model, optimizer = make(how)
    state = torch.load(file, weights_only=True)
    whole_state = StateDictOptions(full_state_dict=True)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=whole_state,
    )
    train(model, optimizer, steps)
    return results(model, optimizer)


class Tower(nn.Module):
    """Two layers with the shapes of a transformer's: four processes can share them evenly."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        shapes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
        self.layers = nn.ModuleList([nn.Linear(*shape, bias=False) for shape in shapes * 2])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def counted(how: str, reference: str = "previous") -> dict[str, Any]:
    """FLOPs of one optimizer step on this process and the bytes it sent in it, by collective."""
    model = distribute(Tower(), how)
    module = model.module if isinstance(model, DistributedDataParallel) else model
    rule = lw.NoiseAdaptive(reference=reference)
    optimizer = lw.Lanton(lw.param_groups(module, overrides={"*": {"role": "hidden"}}), rates=rule)
    if rule.needs_replicas:
        optimizer.watch_replicas(model)
    sent: dict[str, int] = {}
    for _ in range(2):
        model(torch.ones(8, 16)).sum().backward()
        sent.clear()
        with counting_bytes(sent), FlopCounterMode(display=False) as flops:
            optimizer.step()
    return {"flops": flops.get_total_flops(), "sent": sent}


@contextmanager
def counting_bytes(sent: dict[str, int]) -> Iterator[None]:
    """Counts what this process puts into each collective. Of an all-to-all, what leaves the process."""
    gathers = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # before torch 2.13
    to_all, gather, reduce = dist.all_to_all_single, getattr(dist, gathers), dist.all_reduce

    def count(name: str, number: int) -> None:
        sent[name] = sent.get(name, 0) + number

    def all_to_all_single(received, given, lengths, sizes, group, async_op):
        others = sum(sizes) - sizes[dist.get_rank(group)]
        count("all_to_all", others * given.element_size())
        return to_all(received, given, lengths, sizes, group=group, async_op=async_op)

    def all_gather_single(received, given, group, async_op):
        count("all_gather", given.numel() * given.element_size() * (dist.get_world_size(group) - 1))
        return gather(received, given, group=group, async_op=async_op)

    def all_reduce(tensor, *args, **kwargs):
        count("all_reduce", tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **kwargs)

    dist.all_to_all_single, dist.all_reduce = all_to_all_single, all_reduce
    setattr(dist, gathers, all_gather_single)
    try:
        yield
    finally:
        dist.all_to_all_single, dist.all_reduce = to_all, reduce
        setattr(dist, gathers, gather)


def poisoned(how: str, policy: str) -> str | dict[str, Any]:
    """A step in which one entry of one gradient is not finite, on the last process alone."""
    model, optimizer = make(how)
    optimizer.guard.policy = policy
    train(model, optimizer, range(2))
    backward(model, optimizer, 2)
    before = results(model, optimizer)
    if dist.get_rank() == dist.get_world_size() - 1:
        local_part(next(p for name, p in model.named_parameters() if "square" in name).grad)[-1, 0] = math.nan
    try:
        optimizer.step()
    except lw.LayerwiseError as error:
        return str(error)
    after = results(model, optimizer)
    same = all(torch.equal(after["weights"][k], before["weights"][k]) for k in before["weights"])
    return {"untouched": same, "skipped": optimizer.skipped_steps}


def partly_missing() -> dict[str, Tensor]:
    """Plain replicas, averaged by hand, where one process has no gradient of one matrix and others have none of another."""
    model = make_model()
    optimizer = make_optimizer(model, "Lanton", "previous")
    rank = dist.get_rank() if dist.is_initialized() else None
    for step in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(*batch(step)[:2]), batch(step)[2])
        loss.backward()
        model.square.weight.grad = None  # nobody has it: left alone
        if rank is None:
            model.wide.weight.grad.zero_()  # what an absent gradient stands for
        elif rank == 0:
            model.wide.weight.grad = None
        else:
            model.wide.weight.grad.zero_()
        optimizer.step()
    return weights(model)


def different_models() -> str:
    model = Model(12 if dist.get_rank() else 16).double()
    optimizer = make_optimizer(model, "Lanton", "none")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    try:
        optimizer.step()
    except lw.LayerwiseError as error:
        return str(error)
    return ""


def two_dimensional_shards() -> str:
    mesh = init_device_mesh("cpu", (2, 2))
    param = nn.Parameter(distribute_tensor(torch.eye(8), mesh, [Shard(0), Shard(1)]))
    optimizer = lw.Muon([{"params": [("weight", param)], **LAYOUT}])
    param.grad = torch.ones_like(param)
    try:
        optimizer.step()
    except lw.LayerwiseError as error:
        return str(error)
    return ""


def tensor_parallel() -> bool:
    """One dimension of tensor parallelism, by columns: as good as any other sharding."""
    torch.manual_seed(0)
    start, grad = torch.randn(10, 8), torch.randn(10, 8)
    alone = nn.Parameter(start.clone())
    cut = nn.Parameter(distribute_tensor(start, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(1)]))
    for param in (alone, cut):
        optimizer = lw.Muon([{"params": [("weight", param)], **LAYOUT}])
        param.grad = grad.clone() if param is alone else distribute_tensor(grad, cut.device_mesh, [Shard(1)])
        if param is alone:
            optimizer.work = LocalWork()
        optimizer.step()
    return torch.allclose(whole(cut), alone.detach(), atol=1e-6)


def halves_not_averaged() -> str:
    """The usual loop of accumulation, whose first half stays on its process."""
    model, optimizer = make("ddp", "Lanton", "independent")
    assert isinstance(model, DistributedDataParallel)
    tokens, features, targets = batch(0)
    with model.no_sync():
        nn.functional.cross_entropy(model(mine(tokens), mine(features)), mine(targets)).backward()
    try:
        optimizer.hold_half()
    except LayerwiseError as error:
        return str(error)
    return ""
