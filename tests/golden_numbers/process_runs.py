"""Two processes: every way that a matrix can take between them, and the noise between replicas."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from networks import Zoo, drawn, tokens, zoo_backward, zoo_groups
from optimizer_runs import DTYPES, result
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import layerwise as lw

RULES = {
    "previous": lw.NoiseAdaptive(),
    "replicas": lw.NoiseAdaptive(reference="replicas"),
    "namo": lw.NormAdaptive(),
}
RUNS = [
    ("ddp", "Muon", None),
    ("ddp", "Lanton", "previous"),
    ("ddp", "Lanton", "replicas"),
    ("fsdp", "Muon", None),
    ("fsdp", "DMuon", "namo"),
    ("fsdp", "Scion", "previous"),
    ("fsdp", "Signum", "previous"),
    ("fsdp", "Lanton", "previous"),
    ("fsdp", "Lanton", "replicas"),
]


def train(how: str, preset: str, rule: str | None, dtype: str) -> dict[str, Any]:
    model = inner = drawn(Zoo(scale=(1,)), DTYPES[dtype])  # fully_shard takes no scalars
    if how == "ddp":
        model = DistributedDataParallel(model, bucket_cap_mb=0.01)
    else:
        model = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = getattr(lw, preset)(zoo_groups(inner), lr=0.01, rates=RULES.get(rule or ""))
    optimizer.work = lw.DistributedWork(bucket_bytes=4000)  # several rounds
    if rule == "replicas":
        optimizer.watch_replicas(model)
    for step in range(5):
        optimizer.zero_grad()
        zoo_backward(model, tokens(step).chunk(2)[dist.get_rank()])
        optimizer.step()
    return result(inner, optimizer)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        found = {
            f"{how}, {preset}, {rule}, {dtype}": train(how, preset, rule, dtype)
            for how, preset, rule in RUNS
            for dtype in ("float64", "float32")
        }
        torch.save(found, Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def run() -> dict[str, Any]:
    """What the first process ends with; the second has to end with the same."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (folder,), nprocs=2)
        first, second = (torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2))
    assert first == second
    return first
