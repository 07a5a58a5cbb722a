"""Sums over each tensor of an update and its gradients: what norms, ratios and first-order loss changes are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.common.tensors import is_sharded, local_part
from layerwise.function_space.measuring.moments import TensorUpdate
from layerwise.function_space.measuring.process_group import ALONE, Processes
from layerwise.function_space.steps.spectral_norm import Sum, spectral_norms

#: Tensors of one shape are worked on together as far as this many entries of them: of their weights, updates, gradients,
#: earlier gradients and the difference of these.
_TOGETHER = 1 << 23
#: Matrices are kept for one estimate of all their spectral norms up to this many entries: only of small ones is it the
#: number of operations that costs.
_KEPT = 1 << 20


@dataclass(frozen=True)
class TensorSums:
    """Sums over the entries of one parameter: of squares, and of products of its gradient.

    What needs a gradient is None where there is none, what needs an earlier one where that is missing.

    Attributes:
        entries: how many there are.
        weight_square: sum of squares of the weights before the step.
        update_square: of the update.
        matrix_norm: the update's spectral norm, from below; of a tensor of more dimensions that of `(first, rest)`; None for
            vectors.
        gradient_square: of the gradient.
        gradient_update: sum of gradient times update.
        gradient_earlier: of gradient times earlier gradient.
        difference_square: of squares of the difference of the two gradients.
    """

    entries: int
    weight_square: float
    update_square: float
    matrix_norm: float | None
    gradient_square: float | None = None
    gradient_update: float | None = None
    gradient_earlier: float | None = None
    difference_square: float | None = None


def update_sums(
    updates: Mapping[str, TensorUpdate],
    gradients: Mapping[str, Tensor] | None = None,
    earlier: Mapping[str, Tensor] | None = None,
    *,
    steps: int = 6,
    processes: Processes = ALONE,
) -> dict[str, TensorSums]:
    """The sums of each tensor. Waits for the device once for each lot of matrices and once for the sums.

    Args:
        updates: what a step did, with the weights before it as `old`.
        gradients: the step's, by the same names.
        earlier: those of an earlier step.
        steps: of the spectral norm's estimate; see `spectral_norms`.
        processes: those that hold parts of sharded tensors (DTensors).
    """
    sharded = any(is_sharded(update.new) for update in updates.values())
    together = processes if sharded else ALONE  # replicas are equal: there is nothing to ask
    rows: dict[str, Tensor] = {}
    norms = _Norms(steps, together.sum_ if sharded else None)
    gradients, earlier = gradients or {}, earlier or {}
    for names in _alike(updates, gradients, earlier):
        parts = [_part(updates[name], together) for name in names]
        deltas = _stacked([part.update() for part in parts])
        tensors = [_stacked([part.weight() for part in parts]), deltas]
        for found in (gradients, earlier) if names[0] in gradients else ():
            given = [part.of(found[n]) for n, part in zip(names, parts, strict=True) if n in found]
            tensors += [_stacked(given)] if given else []
        rows |= dict(zip(names, _sums(*tensors) / parts[0].copies, strict=True))
        if len(parts[0].shape) > 1:
            # Replicated parts count once for each process that holds them: their squares have to add up to one's.
            matrices = parts[0].matrices(deltas) / math.sqrt(parts[0].copies)
            norms.add(names, matrices)
    norms.estimate()
    table = _table(rows, together)
    return {
        name: TensorSums(
            update.new.numel(), table[name][0], table[name][1], norms.found.get(name), *table[name][2:]
        )
        for name, update in updates.items()
    }


class _Norms:
    """Spectral norms by name, small matrices of several shapes together."""

    def __init__(self, steps: int, sum_: Sum | None) -> None:
        self.steps, self.sum_ = steps, sum_
        self.found: dict[str, float] = {}
        self._names: list[str] = []
        self._stacks: list[Tensor] = []

    def add(self, names: list[str], matrices: Tensor) -> None:
        """`matrices`: `[count, rows, columns]`, one for each name."""
        self._names += names
        self._stacks.append(matrices)
        if sum(stack.numel() for stack in self._stacks) > _KEPT:
            self.estimate()

    def estimate(self) -> None:
        """Of what was added since."""
        norms = spectral_norms(self._stacks, self.steps, self.sum_)
        numbers = [number for stack in norms for number in stack.tolist()]
        self.found |= dict(zip(self._names, numbers, strict=True))
        self._names, self._stacks = [], []


def _alike(
    updates: Mapping[str, TensorUpdate], gradients: Mapping[str, Tensor], earlier: Mapping[str, Tensor]
) -> Iterator[list[str]]:
    """Names of tensors that can be stacked, in lots of bounded size; in the same order on every process."""
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name, update in updates.items():
        new = update.new
        places = str(getattr(new, "placements", None))
        known = name in gradients, name in gradients and name in earlier
        kinds.setdefault((new.shape, update.dtype, new.device, places, known), []).append(name)
    for names in kinds.values():
        count = max(1, _TOGETHER // max(1, updates[names[0]].new.numel()))
        yield from (names[start : start + count] for start in range(0, len(names), count))


@dataclass(frozen=True)
class _Part:
    """This process's part of a tensor's update, and how many processes hold the same part."""

    block: TensorUpdate
    shape: tuple[int, ...]  # of the whole tensor
    dim: int  # of the tensor, which lies first in the part
    gathered: bool  # whole on every process, from a layout that has no rows
    copies: int

    def update(self) -> Tensor:
        """Flat."""
        return self.block.whole().flatten()

    def weight(self) -> Tensor:
        """Before the step, flat."""
        before = self.block.new if self.block.old is None else self.block.old
        return before.detach().flatten()

    def of(self, gradient: Tensor) -> Tensor:
        """The same part of a gradient, flat."""
        tensor = _gathered(gradient.detach()) if self.gathered else local_part(gradient.detach())
        tensor = tensor.movedim(self.dim, 0) if tensor.ndim else tensor
        return tensor.flatten().to(self.block.dtype)

    def matrices(self, flat: Tensor) -> Tensor:
        """`[count, entries]` as matrices, of which this process has some rows."""
        columns = math.prod(self.shape) // max(1, self.shape[self.dim])
        return flat.view(flat.shape[0], flat.shape[1] // max(1, columns), columns)


def _part(update: TensorUpdate, processes: Processes) -> _Part:
    new, dim, pieces, gathered = update.new, 0, 1, False
    if processes.count > 1 and is_sharded(new):
        cuts = _cuts(new)
        gathered = len(cuts) > 1 or bool(cuts and cuts[0][0] and new.ndim > 2)
        if gathered:
            old = None if update.old is None else _gathered(update.old)
            update = TensorUpdate(_gathered(new), old, update.decay)
        elif cuts:
            dim, pieces = cuts[0]
    return _Part(update.block(dim), tuple(new.shape), dim, gathered, processes.count // pieces)


def _cuts(tensor: Tensor) -> list[tuple[int, int]]:
    """The dimensions along which a DTensor is cut, and into how many pieces."""
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(tensor, DTensor)
    sizes = tensor.device_mesh.shape
    return [
        (place.dim % max(1, tensor.ndim), sizes[index])
        for index, place in enumerate(tensor.placements)
        if isinstance(place, Shard)
    ]


def _gathered(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def _stacked(flat: list[Tensor]) -> Tensor:
    """`[count, entries]`; one alone is not copied."""
    return flat[0][None] if len(flat) == 1 else torch.stack(flat)


def _sums(
    weights: Tensor, deltas: Tensor, gradients: Tensor | None = None, earlier: Tensor | None = None
) -> Tensor:
    """`[count, sums]` of tensors `[count, entries]`, in the order of `TensorSums`."""
    found = [_squares(weights), _squares(deltas)]
    if gradients is not None:
        found += [_squares(gradients), _dots(gradients, deltas)]
        if earlier is not None:
            found += [_dots(gradients, earlier), _squares(gradients - earlier)]
    return torch.stack(found, 1)


def _squares(rows: Tensor) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=1, dtype=wide).double().square()


def _dots(rows: Tensor, others: Tensor) -> Tensor:
    return torch.linalg.vecdot(rows, others).double()


def _table(rows: Mapping[str, Tensor], processes: Processes) -> dict[str, list[float]]:
    """The rows as numbers, summed over processes where they are of sharded tensors."""
    if not rows:
        return {}
    home = next((row.device for row in rows.values() if row.device.type != "cpu"), torch.device("cpu"))
    flat = torch.cat([row.to(home) for row in rows.values()])
    numbers = iter(processes.sum_(flat).tolist())
    return {name: [next(numbers) for _ in range(row.numel())] for name, row in rows.items()}
