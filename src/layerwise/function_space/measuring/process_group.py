"""The processes that take one optimizer step together: how gradients of probes are gathered over them into moments.

With data parallelism a process sees its part of the global batch. A probe is drawn over the global batch, each process
runs its part of it, and the gradients add up to the probe's. What a rate is made of is linear in that sum but for a few
squares at the end, so mostly small sums are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.common.collectives import reduce_scatter_single
from layerwise.common.tensors import is_sharded
from layerwise.function_space.measuring.moments import Estimator, Moments, TensorUpdate

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

    def rows(self, count: int) -> slice:
        """Which of `count` rows `scatter_rows` gives this process."""
        step = -(-count // self.count)
        return slice(min(count, self.rank * step), min(count, (self.rank + 1) * step))

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
        reduce_scatter_single(received, sent.contiguous(), self.group)
        own = self.rows(tensor.shape[0])
        return received[: own.stop - own.start].to(tensor.device)

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


#: What a tensor of some shape is estimated with.
Choose = Callable[[tuple[int, ...]], Estimator]


class Collector:
    """Takes the gradients of probes on one process by itself, and makes them into moments.

    Attributes:
        moments: of each tensor, by name.
        processes: those that run the same probes, and take as many at once.
    """

    def __init__(self, updates: Mapping[str, TensorUpdate], choose: Choose, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.moments = {name: Moments(choose(tuple(update.new.shape)), update) for name, update in updates.items()}

    def add(self, name: str, grads: Tensor) -> None:
        """The gradients of one tensor under some probes (and slices), `[..., *shape]`."""
        self.moments[name].add(grads)

    def done(self, probes: int) -> None:
        """Those of all tensors have come under these many probes; the absent ones are 0."""


class SharedCollector(Collector):
    """Over processes that see different rows: a probe's gradient is the sum of theirs.

    `full_cov` needs that sum's product with the update alone, one number a probe. The others square its entries: each
    process gets an equal block of its rows (a reduce-scatter, half of what averaging gradients in training moves) and
    makes the sums of it. These are added up over processes, one exchange for all tensors. Blocks are sent in one order
    on all processes, also for tensors that have no gradient on some.

    Of parameters that FSDP2 shards the gradients are added up already, and each process has its shard of them. Sums over a
    shard's own rows are complete; whatever else is made of several shards is added up like the rest.
    """

    def __init__(self, updates: Mapping[str, TensorUpdate], choose: Choose, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.updates = updates
        self._places: dict[str, tuple[int, int]] = {}  # of shards: the dimension that is cut, and how many hold the same
        self._order: list[str] = []  # in which the others' gradients are exchanged
        self.moments = {}
        for name, update in updates.items():
            estimator = choose(tuple(update.new.shape))
            if is_sharded(update.new):
                from layerwise.function_space.measuring.fsdp import placement

                self._places[name] = placement(name, update.new, processes)
                update = update.block(self._places[name][0])
                # An estimator says of a matrix and of its transpose the same.
                estimator = choose(tuple(update.new.shape))
            elif not estimator.total:
                update = update.part(processes.rows(len(torch.atleast_1d(update.new))))
                self._order.insert(0, name)  # gradients are complete in about the reverse order of the parameters
            self.moments[name] = Moments(estimator, update)
        self._turn = 0
        self._waiting: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, grads: Tensor) -> None:
        if name in self._places:
            dim, replicas = self._places[name]
            sums = self.moments[name].unscaled_sums(grads.movedim(dim + 1, 1) if grads.ndim > 1 else grads)
            self._sums[name] = sums / replicas  # each of them adds the same
        elif name not in self._order:
            self._sums[name] = self.moments[name].unscaled_sums(grads)
        else:
            self._waiting[name] = grads
            while self._turn < len(self._order) and self._order[self._turn] in self._waiting:
                self._exchange(self._waiting.pop(self._order[self._turn]))

    def done(self, probes: int) -> None:
        while self._turn < len(self._order):
            name = self._order[self._turn]
            new = self.updates[name].new
            absent = new.new_zeros(()).expand(probes, *new.shape)
            self._exchange(self._waiting.pop(name, absent))
        self._add_up(probes)
        self._turn, self._sums = 0, {}

    def _exchange(self, grads: Tensor) -> None:
        """Sum the next tensor's gradients over processes, each keeping its rows."""
        name = self._order[self._turn]
        rows = (grads if grads.ndim > 1 else grads[:, None]).movedim(1, 0).to(self.updates[name].dtype)
        self._sums[name] = self.moments[name].unscaled_sums(self.processes.scatter_rows(rows).movedim(0, 1))
        self._turn += 1

    def _add_up(self, probes: int) -> None:
        """Add up the sums of all tensors over processes in one exchange, and take them; absent ones count as 0."""
        if not self.moments:
            return
        home = next(iter(self.moments.values())).update.new.device
        zeros = torch.zeros(probes, 1, dtype=torch.float64, device=home)
        parts = [
            self._sums[name].to(home) if name in self._sums else zeros.expand(-1, m.count)
            for name, m in self.moments.items()
        ]
        together = self.processes.sum_(torch.cat(parts, 1))
        for m, part in zip(self.moments.values(), together.split([p.shape[1] for p in parts], 1), strict=True):
            m.take(part, 0.0)
