"""What a step did to each tensor, as sums over its update and gradients, and from these to each module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.common.group_by import group_by
from layerwise.common.tensors import is_sharded, local_part, to_host, widened
from layerwise.function_space.measuring.moments import TensorUpdate
from layerwise.function_space.measuring.process_group import ALONE, Processes
from layerwise.function_space.steps.spectral_norm import Sum, spectral_norms

#: Tensors of one shape are worked on together up to this many entries: six stacks of them (weights before and after,
#: update, gradients, earlier ones and the difference of these) are 160 MiB in float32.
_TOGETHER = (160 << 20) // (6 * 4)
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
        place = _place(updates[names[0]].new, together)
        several = [updates[name] for name in names]
        old = [update.old for update in several if update.old is not None]
        new = place.stack([update.new for update in several])
        lot = TensorUpdate(new, place.stack(old) if old else None, several[0].decay)
        deltas = lot.whole()
        tensors = [lot.new if lot.old is None else lot.old, deltas]
        known = [found for found in (gradients, earlier) if names[0] in found and names[0] in gradients]
        tensors += [place.stack([found[name] for name in names]).to(lot.dtype) for found in known]
        sums = _sums(*(tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in tensors))
        rows |= dict(zip(names, sums if place.copies == 1 else sums / place.copies, strict=True))
        if len(place.shape) > 1:
            norms.add(names, place.matrices(deltas))
    norms.estimate()
    table = {name: row.tolist() for name, row in to_host(rows, together.sum_).items()}
    return {
        name: TensorSums(update.new.numel(), table[name][0], table[name][1], norms.found.get(name), *table[name][2:])
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

    def kind(name: str) -> tuple[object, ...]:
        new, known = updates[name].new, (name in gradients, name in gradients and name in earlier)
        return new.shape, new.dtype, new.device, str(getattr(new, "placements", None)), updates[name].decay, known

    for names in group_by(updates, kind).values():
        count = max(1, _TOGETHER // max(1, updates[names[0]].new.numel()))
        yield from (names[start : start + count] for start in range(0, len(names), count))


@dataclass(frozen=True)
class _Place:
    """Which part of tensors of one shape this process has, and how many processes hold the same part."""

    shape: tuple[int, ...]  # of the whole tensor
    sharded: bool = False
    dim: int = 0  # of the tensor, which lies first in the part
    gathered: bool = False  # whole on every process, from a layout that has no rows
    copies: int = 1

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """This process's parts, `[count, *part]`; one alone is not copied."""
        own = [tensor.detach() for tensor in tensors]
        if self.sharded:
            parts = [_gathered(t) if self.gathered else local_part(t) for t in own]
            own = [part.movedim(self.dim, 0) if part.ndim else part for part in parts]
        return own[0][None] if len(own) == 1 else torch.stack(own)

    def matrices(self, stack: Tensor) -> Tensor:
        """`[count, *part]` as matrices, of which this process has some rows.

        Replicated parts count once for each process that holds them: their squares have to add up to one's.
        """
        columns = math.prod(self.shape) // max(1, self.shape[self.dim])
        found = stack.reshape(len(stack), stack.numel() // len(stack) // max(1, columns), columns)
        return found if self.copies == 1 else found / math.sqrt(self.copies)


def _gathered(tensor: Tensor) -> Tensor:
    """A DTensor gathered, any other tensor as it is."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def _place(tensor: Tensor, processes: Processes) -> _Place:
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return _Place(shape, copies=processes.count)
    if processes.count == 1:
        return _Place(shape, sharded=True)
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(tensor, DTensor)
    pairs = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    cuts = [(place.dim % max(1, tensor.ndim), size) for place, size in pairs if isinstance(place, Shard)]
    if len(cuts) > 1 or bool(cuts and cuts[0][0] and tensor.ndim > 2):
        return _Place(shape, sharded=True, gathered=True, copies=processes.count)
    dim, pieces = cuts[0] if cuts else (0, 1)
    return _Place(shape, True, dim, copies=processes.count // pieces)


def _sums(weights: Tensor, deltas: Tensor, gradients: Tensor | None = None, earlier: Tensor | None = None) -> Tensor:
    """`[count, sums]` of tensors `[count, entries]`, in the order of `TensorSums`."""
    found = [_squares(weights), _squares(deltas)]
    if gradients is not None:
        found += [_squares(gradients), _dots(gradients, deltas)]
        if earlier is not None:
            found += [_dots(gradients, earlier), _squares(gradients - earlier)]
    return torch.stack(found, 1)


def _squares(rows: Tensor) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return widened(torch.linalg.vector_norm(rows, dim=1, dtype=wide)).square()


def _dots(rows: Tensor, others: Tensor) -> Tensor:
    return widened(torch.linalg.vecdot(rows, others))


#: What parameters of the model itself, in no module of it, are listed under.
ROOT = "(model)"


def module_of(parameter: str) -> str:
    """The module that a parameter belongs to; of a parametrised weight, the layer and not its parametrization.

    Examples:
        `module_of("h.0.mlp.c_fc.weight") == "h.0.mlp.c_fc"`
    """
    return parameter.rpartition(".")[0].partition("parametrizations.")[0].rstrip(".") or ROOT


def by_module(parameters: Iterable[str]) -> dict[str, list[str]]:
    """The parameters of each module, in order."""
    return group_by(parameters, module_of)


@dataclass(frozen=True)
class ModuleUpdate:
    """One step of one module: over all entries of its own parameters.

    Attributes:
        weight_rms: of the weights before the step.
        update_rms: of the update.
        ratio: norm of the update over that of the weights; inf where the weights are 0.
        spectral: spectral norm of the update, from below; the largest of the module's matrices; None without one.
        gradient_rms: None where there is no gradient.
        noise_to_signal: of the gradient, from its difference to the step before: `|g - g'| / sqrt(2 <g, g'>)`, where two
            independent gradients have `E |g - g'|^2 / 2` = noise and `E <g, g'>` = signal; inf where they do not agree at
            all; None without an earlier gradient.
        loss_change: what the step changes the loss of its own batch by, to first order: `<g, dW>`.
    """

    weight_rms: float
    update_rms: float
    ratio: float
    spectral: float | None
    gradient_rms: float | None = None
    noise_to_signal: float | None = None
    loss_change: float | None = None


def module_updates(sums: Mapping[str, TensorSums]) -> dict[str, ModuleUpdate]:
    """What the step did to each module."""
    return {module: _of_module([sums[name] for name in names]) for module, names in by_module(sums).items()}


def _of_module(sums: list[TensorSums]) -> ModuleUpdate:
    entries = max(1, sum(s.entries for s in sums))
    weight, update = sum(s.weight_square for s in sums), sum(s.update_square for s in sums)
    norms = [s.matrix_norm for s in sums if s.matrix_norm is not None]
    gradients = [(s.gradient_square, s.entries) for s in sums if s.gradient_square is not None]
    changes = [s.gradient_update for s in sums if s.gradient_update is not None]
    noises = [s.difference_square for s in sums if s.difference_square is not None]
    signal = sum(s.gradient_earlier for s in sums if s.gradient_earlier is not None)
    gradient_rms = noise_to_signal = None
    if gradients:
        gradient_rms = math.sqrt(sum(square for square, _ in gradients) / max(1, sum(count for _, count in gradients)))
    if noises:
        noise_to_signal = math.sqrt(sum(noises) / 2 / signal) if signal > 0 else math.inf
    return ModuleUpdate(
        weight_rms=math.sqrt(weight / entries),
        update_rms=math.sqrt(update / entries),
        ratio=math.sqrt(update / weight) if weight else (math.inf if update else 0.0),
        spectral=max(norms) if norms else None,
        gradient_rms=gradient_rms,
        noise_to_signal=noise_to_signal,
        loss_change=sum(changes) if changes else None,
    )
