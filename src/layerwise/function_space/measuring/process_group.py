"""The processes that take one optimizer step together: how gradients of probes are gathered over them into moments.

With data parallelism a process sees its part of the global batch. A probe is drawn over the global batch, each process
runs its part of it, and the gradients add up to the probe's. What a rate is made of is linear in that sum but for a few
squares at the end, so mostly small sums are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.common.tensors import is_sharded, reduce_scatter_single
from layerwise.function_space.measuring.moments import Estimator, Moments, TensorUpdate

#: `"auto"`: all processes of torch.distributed where it is initialised, else this one; `None`: this one alone.
ProcessesOption = Literal["auto"] | dist.ProcessGroup | None


class Processes:
    """The processes of a torch.distributed group, which take a step together; alone, one by itself, which asks nobody.

    Attributes:
        count: how many they are.
        rank: the number of this one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        self.group = group
        self.count, self.rank = (1, 0) if alone else (dist.get_world_size(group), dist.get_rank(group))
        kinds = "cpu" if alone else str(dist.get_backend_config(group))
        self._devices = [kind for kind in ("cpu", "cuda", "xpu") if kind in kinds] or ["cpu"]

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """These numbers of every process, by rank."""
        if self.count == 1:
            return [list(numbers)]
        table = torch.zeros(self.count, len(numbers), dtype=torch.int64, device=self._devices[0])
        table[self.rank] = torch.tensor(numbers, device=self._devices[0])
        return self.sum_(table).tolist()

    def least(self, number: int) -> int:
        """The least of every process's number."""
        return min(numbers[0] for numbers in self.gather([number]))

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        return self._exchanged(tensor, dist.all_reduce)

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest over processes, in place."""
        return self._exchanged(tensor, partial(dist.all_reduce, op=dist.ReduceOp.MAX))

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's values, everywhere, in place: what all decide by is then equal to the last bit."""
        return self._exchanged(tensor, partial(dist.broadcast, group_src=0))

    def _exchanged(self, tensor: Tensor, collective: Callable[..., Any]) -> Tensor:
        if self.count == 1:
            return tensor
        sent = self._sendable(tensor)
        collective(sent, group=self.group)
        return tensor if sent is tensor else tensor.copy_(sent)

    def scatter_rows(self, tensor: Tensor) -> Tensor:
        """Of the sum of `[rows, ...]` over processes, this process's rows: equal parts, the last ones short or empty."""
        if self.count == 1:
            return tensor
        sent = self._sendable(tensor)
        step = -(-tensor.shape[0] // self.count)
        padding = sent.new_zeros(step * self.count - len(sent), *sent.shape[1:])
        received = sent.new_empty(step, *sent.shape[1:])
        reduce_scatter_single(received, torch.cat([sent, padding]) if len(padding) else sent.contiguous(), self.group)
        own = self.rows(tensor.shape[0])
        return received[: own.stop - own.start].to(tensor.device)

    def rows(self, count: int) -> slice:
        """Which of `count` rows `scatter_rows` gives this process."""
        step = -(-count // self.count)
        return slice(min(count, self.rank * step), min(count, (self.rank + 1) * step))

    def _sendable(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device.type in self._devices else tensor.to(self._devices[0])


ALONE = Processes(alone=True)


def processes_of(option: ProcessesOption) -> Processes:
    """The processes that `option` means, now."""
    if option == "auto":
        option = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return ALONE if option is None or dist.get_world_size(option) < 2 else Processes(option)


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
        self.moments = {}
        self._places: dict[str, tuple[int, int]] = {}  # of shards: the dimension that is cut, and how many hold the same
        self._order: list[str] = []  # in which the others' gradients are exchanged
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
        self._due = list(self._order)
        self._waiting: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, grads: Tensor) -> None:
        if name in self._order:
            self._waiting[name] = grads
            while self._due and self._due[0] in self._waiting:
                self._exchange(self._due.pop(0))
        else:
            dim, copies = self._places.get(name, (0, 1))
            sums = self.moments[name].unscaled_sums(grads.movedim(dim + 1, 1) if grads.ndim > 1 else grads)
            self._sums[name] = sums / copies  # each of them adds the same

    def _exchange(self, name: str) -> None:
        """Sum a tensor's gradients over processes, each keeping its rows."""
        grads = self._waiting.pop(name)
        rows = (grads if grads.ndim > 1 else grads[:, None]).movedim(1, 0).to(self.updates[name].dtype)
        self._sums[name] = self.moments[name].unscaled_sums(self.processes.scatter_rows(rows).movedim(0, 1))

    def done(self, probes: int) -> None:
        """Add up the sums of all tensors over processes in one exchange, and take them; absent ones count as 0."""
        for name in self._due:
            new = self.updates[name].new
            self._waiting.setdefault(name, new.new_zeros(()).expand(probes, *new.shape))
            self._exchange(name)
        if self.moments:
            home = next(iter(self.moments.values())).update.new.device
            zeros = torch.zeros(probes, 1, dtype=torch.float64, device=home)
            absent = {name: zeros.expand(-1, m.count) for name, m in self.moments.items()}
            parts = [self._sums.get(name, absent[name]).to(home) for name in self.moments]
            together = self.processes.sum_(torch.cat(parts, 1))
            for m, part in zip(self.moments.values(), together.split([p.shape[1] for p in parts], 1), strict=True):
                m.take(part, 0.0)
        self._due, self._sums = list(self._order), {}
