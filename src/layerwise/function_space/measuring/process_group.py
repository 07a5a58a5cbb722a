"""The processes that take one optimizer step together: what a measurement has to ask of the others.

With data parallelism a process sees its part of the global batch. A probe is drawn over the global batch, each process
runs its part of it, and the gradients add up to the probe's. What a rate is made of is linear in that sum but for a few
squares at the end, so mostly small sums are exchanged; see `collect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

#: `"auto"`: all processes of torch.distributed where it is initialised, else this one; `None`: this one alone.
ProcessesOption = Literal["auto"] | dist.ProcessGroup | None


class Processes:
    """A process by itself: there is nothing to ask."""

    count = 1
    rank = 0

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """These numbers of every process, by rank."""
        return [list(numbers)]

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest over processes, in place."""
        return tensor

    def scatter_rows(self, tensor: Tensor) -> Tensor:
        """Of the sum of `[rows, ...]` over processes, this process's rows: equal parts, the last ones short or empty."""
        return tensor

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's values, everywhere: what all decide by is then equal to the last bit."""
        return tensor

    def rows(self, count: int) -> tuple[int, int]:
        """First and last (exclusive) of `count` rows that `scatter_rows` gives this process."""
        step = -(-count // self.count)
        return min(count, self.rank * step), min(count, (self.rank + 1) * step)

    def least(self, number: int) -> int:
        """The least of every process's number."""
        return min(numbers[0] for numbers in self.gather([number]))


class Group(Processes):
    """The processes of a torch.distributed group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.count = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        kinds = str(dist.get_backend_config(group))
        self._devices = [kind for kind in ("cpu", "cuda", "xpu") if kind in kinds] or ["cpu"]

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._devices[0])
        found = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(found, mine, group=self.group)
        return [each.tolist() for each in found]

    def sum_(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def scatter_rows(self, tensor: Tensor) -> Tensor:
        sent = self._sendable(tensor)
        step = -(-tensor.shape[0] // self.count)
        if sent.shape[0] < step * self.count:
            padding = sent.new_zeros(step * self.count - sent.shape[0], *sent.shape[1:])
            sent = torch.cat([sent, padding])
        received = sent.new_empty(step, *sent.shape[1:])
        _reduce_scatter(received, sent.contiguous(), group=self.group)
        first, last = self.rows(tensor.shape[0])
        return received[: last - first].to(tensor.device)

    def same(self, tensor: Tensor) -> Tensor:
        sent = self._sendable(tensor)
        dist.broadcast(sent, group=self.group, group_src=0)
        return sent.to(tensor.device)

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        sent = self._sendable(tensor)
        dist.all_reduce(sent, operation, group=self.group)
        return tensor if sent is tensor else tensor.copy_(sent)

    def _sendable(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device.type in self._devices else tensor.to(self._devices[0])


# Its name from torch 2.13 on, and before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

ALONE = Processes()


def processes_of(option: ProcessesOption) -> Processes:
    """The processes that `option` means, now."""
    if option is None:
        return ALONE
    if option != "auto":
        return Group(option) if dist.get_world_size(option) > 1 else ALONE
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Group()
    return ALONE
