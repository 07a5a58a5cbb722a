"""Two collectives of torch that had other names before torch 2.13, where the old ones still serve with a warning."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def all_gather_single(
    received: Tensor, sent: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """``torch.distributed.all_gather_single``: ``received`` holds ``sent`` of every process, in order."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(received, sent, group=group, async_op=async_op)
    return work


def reduce_scatter_single(received: Tensor, sent: Tensor, group: dist.ProcessGroup | None) -> None:
    """``torch.distributed.reduce_scatter_single``: this process's part of the sum of ``sent`` over all."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(received, sent, group=group)
