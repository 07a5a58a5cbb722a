"""What the processes of a test cluster measure: the same updates on the same global batch at any world size."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from distributed_runs import batch, distribute, make_model
from torch import Tensor, nn

import layerwise as lw

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
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype) / 100
        for name, p in model.named_parameters()
    }


def measured(how: str, method: str, rows: str = "even", masked: bool = False, **options: Any) -> lw.Rates:
    update = update_of(make_model())
    model = distribute(make_model(), how)
    tokens, features, _ = batch(0)
    inputs = spread((tokens, features), rows)
    mask = spread((mask_of(),), rows)[0] if masked else None
    return lw.function_space_rates(model, update, inputs, method=method, probes=5, mask=mask, **options)


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


def forked(method: str, memory: int) -> lw.Rates:
    """Two rows a process at world size 4; only the last two take the branch."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 0] = torch.tensor([-1.0] * 6 + [1.0] * 2)
    model = Forking()
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    mine = x.chunk(world)[rank]
    return lw.function_space_rates(model, update_of(model), mine, method=method, probes=4, memory=memory)
