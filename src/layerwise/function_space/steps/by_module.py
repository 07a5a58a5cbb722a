"""What a step did to each module: from sums over the update and the gradients of each of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerwise.common.group_by import group_by
from layerwise.common.tensors import is_sharded, largest_entry, local_part, or_one, to_host, widened
from layerwise.function_space.measuring.moments import TensorUpdate
from layerwise.function_space.measuring.process_group import ALONE, Processes

#: Tensors of one shape are worked on together up to this many entries: six stacks of them (weights before and after,
#: update, gradients, earlier ones and the difference of these) are 160 MiB in float32.
_TOGETHER = (160 << 20) // (6 * 4)
#: Matrices are kept for one estimate of all their spectral norms up to this many entries: only of small ones is it the
#: number of operations that costs.
_KEPT = 1 << 20


@dataclass(frozen=True)
class ModuleUpdate:
    """One step of one module: over all entries of its own parameters.

    Attributes:
        weight_rms: of the weights before the step.
        update_rms: of the update.
        ratio: norm of the update over that of the weights; inf where the weights are 0.
        spectral: spectral norm of the update, from below; the largest of the module's matrices, a tensor of more dimensions
            being one of `(first, rest)`; None without one.
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


def module_updates(
    updates: Mapping[str, TensorUpdate],
    gradients: Mapping[str, Tensor] | None = None,
    earlier: Mapping[str, Tensor] | None = None,
    *,
    steps: int = 6,
    processes: Processes = ALONE,
) -> dict[str, ModuleUpdate]:
    """What a step did to each module. Waits for the device once for each lot of matrices and once for the sums.

    Args:
        updates: what the step did to each parameter, with the weights before it as `old`.
        gradients: the step's, by the same names.
        earlier: those of an earlier step.
        steps: of the spectral norm's estimate; see `spectral_norms`.
        processes: those that hold parts of sharded tensors (DTensors).
    """
    sharded = any(is_sharded(update.new) for update in updates.values())
    together = processes if sharded else ALONE  # replicas are equal: there is nothing to ask
    rows: dict[str, Tensor] = {}
    norms: dict[str, float] = {}
    matrices: dict[tuple[str, ...], Tensor] = {}  # whose norms are still to be estimated

    def estimate() -> None:
        found = spectral_norms(list(matrices.values()), steps, together.sum_ if sharded else None)
        for names, stack in zip(matrices, found, strict=True):
            norms.update(zip(names, stack.tolist(), strict=True))
        matrices.clear()

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
            matrices[tuple(names)] = place.matrices(deltas)
        if sum(stack.numel() for stack in matrices.values()) > _KEPT:
            estimate()
    estimate()
    table = {name: row.tolist() for name, row in to_host(rows, together.sum_).items()}
    entries = {name: update.new.numel() for name, update in updates.items()}
    return {module: _of_module(names, entries, table, norms) for module, names in by_module(updates).items()}


def _of_module(
    names: list[str], entries: Mapping[str, int], sums: Mapping[str, list[float]], norms: Mapping[str, float]
) -> ModuleUpdate:
    """From the sums over each of its parameters, in the order of `_sums`."""
    found = [[sums[name][place] for name in names if len(sums[name]) > place] for place in range(6)]
    weight, update, gradient, change, signal, difference = map(sum, found)
    all_entries = max(1, sum(entries[name] for name in names))
    gradient_entries = max(1, sum(entries[name] for name in names if len(sums[name]) > 2))
    noise_to_signal = None
    if found[5]:
        noise_to_signal = math.sqrt(difference / 2 / signal) if signal > 0 else math.inf
    return ModuleUpdate(
        weight_rms=math.sqrt(weight / all_entries),
        update_rms=math.sqrt(update / all_entries),
        ratio=math.sqrt(update / weight) if weight else (math.inf if update else 0.0),
        spectral=max((norms[name] for name in names if name in norms), default=None),
        gradient_rms=math.sqrt(gradient / gradient_entries) if found[2] else None,
        noise_to_signal=noise_to_signal,
        loss_change=change if found[3] else None,
    )


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
    dim: int = 0  # of the tensor, which lies first in the part
    gathered: bool = False  # whole on every process, from a layout that has no rows
    copies: int = 1

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """This process's parts, `[count, *part]`; one alone is not copied."""
        own: list[Any] = [tensor.detach() for tensor in tensors]
        if self.gathered:
            own = [tensor.full_tensor() if is_sharded(tensor) else tensor for tensor in own]
        own = [local_part(tensor) for tensor in own]
        if self.dim:
            own = [part.movedim(self.dim, 0) for part in own]
        return own[0][None] if len(own) == 1 else torch.stack(own)

    def matrices(self, stack: Tensor) -> Tensor:
        """`[count, *part]` as matrices, of which this process has some rows.

        Replicated parts count once for each process that holds them: their squares have to add up to one's.
        """
        columns = math.prod(self.shape) // max(1, self.shape[self.dim])
        found = stack.reshape(len(stack), stack.numel() // len(stack) // max(1, columns), columns)
        return found if self.copies == 1 else found / math.sqrt(self.copies)


def _place(tensor: Tensor, processes: Processes) -> _Place:
    shape = tuple(tensor.shape)
    if processes.count == 1 or not is_sharded(tensor):
        return _Place(shape, copies=processes.count)
    from layerwise.function_space.measuring.fsdp import cuts_of

    cuts = cuts_of(tensor)
    if len(cuts) > 1 or bool(cuts and cuts[0][0] and tensor.ndim > 2):
        return _Place(shape, gathered=True, copies=processes.count)
    dim, pieces = cuts[0] if cuts else (0, 1)
    return _Place(shape, dim, copies=processes.count // pieces)


def _sums(weights: Tensor, deltas: Tensor, gradients: Tensor | None = None, earlier: Tensor | None = None) -> Tensor:
    """`[count, sums]` of tensors `[count, entries]`.

    They are the squares of weights and of update; of the gradient, and its product with the update; its product with the
    earlier one, and the square of their difference.
    """
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


#: What adds a tensor over the processes that hold parts of one matrix, in place.
Sum = Callable[[Tensor], Tensor]
#: Stacks of at most so many columns share one set of vectors, padded with zeros.
_SHORT = 1 << 10
#: Matrices of more entries are multiplied one by one on a CPU: there starting an operation costs nothing beside it.
_LARGE = 1 << 14


@dataclass
class _Lanczos:
    """Lanczos on `A^T A` of several stacks of matrices: `V^T A^T A V = T`, tridiagonal.

    Starting an operation is what small matrices cost, so the vectors of all stacks are worked on together, and the products
    alone go stack by stack. Where rows of the matrices are spread over processes, `right` is everywhere the same.

    Attributes:
        stacks: `[count, rows, columns]` each.
        right: the vectors of all, `[total, most columns]`; zeros where a stack has fewer columns.
        diagonal: of T, `[total]` each.
        above: beside it.
        earlier: the vectors before.
    """

    stacks: list[Tensor]
    right: Tensor
    diagonal: list[Tensor] = field(default_factory=list)
    above: list[Tensor] = field(default_factory=list)
    earlier: Tensor | None = None

    def products(self) -> Tensor:
        """`A^T A` times the vectors, `[total, most columns]`, to be summed over processes."""
        parts = self.right.split([len(stack) for stack in self.stacks])
        return _padded([_squared(stack, part) for stack, part in zip(self.stacks, parts, strict=True)])

    def extend(self, summed: Tensor) -> None:
        """One more row of T, from the sums over processes of `products`."""
        rayleigh = torch.linalg.vecdot(self.right, summed)
        following = torch.addcmul(summed, self.right, rayleigh[:, None], value=-1)
        if self.earlier is not None:
            following.addcmul_(self.earlier, self.above[-1][:, None], value=-1)
        rest = torch.linalg.vector_norm(following, dim=1)
        self.earlier, self.right = self.right, following / or_one(rest)[:, None]
        self.diagonal.append(rayleigh)
        self.above.append(rest)

    def norms(self) -> Tensor:
        """The root of the largest eigenvalue of T, `[total]`, on the CPU: never above the norm, but for rounding."""
        tridiagonal = torch.diag_embed(torch.stack(self.diagonal, -1))
        if len(self.above) > 1:
            # The decomposition reads what is below the diagonal.
            tridiagonal += torch.diag_embed(torch.stack(self.above[:-1], -1), -1)
        # NaN and inf, which the decomposition refuses, are what the norm then is.
        tridiagonal = tridiagonal.cpu()  # so small that a device takes longer, and its user wants numbers
        finite = tridiagonal.isfinite().all(-1).all(-1)
        largest = torch.linalg.eigvalsh(torch.where(finite[:, None, None], tridiagonal, 0.0))[:, -1]
        return torch.where(finite, largest.clamp_min(0).sqrt(), math.nan)


def spectral_norms(stacks: Sequence[Tensor], steps: int = 6, sum_: Sum | None = None) -> list[Tensor]:
    """Estimates of the spectral norms of matrices, from below.

    `steps` steps of Lanczos on `A^T A` from a fixed vector: two products with each matrix a step. Six steps are within a few
    per cent for the updates of training (tests hold them against an SVD), and exact from `min(rows, columns)` steps on.

    Args:
        stacks: matrices of equal shape together, `[count, rows, columns]` each, float32 or float64.
        steps: of Lanczos.
        sum_: where rows of matrices are spread over processes, or whole matrices are on all of them scaled so that their
            squares add up to one matrix's: adds a tensor over processes. All stacks go in one exchange a step.

    Returns:
        For each stack its norms, `[count]`, on the CPU.

    Examples:
        `spectral_norms([torch.stack([layer.weight for layer in layers])])[0]`
    """
    # Small singular values matter to nobody here: scaled to order one, squares neither under- nor overflow.
    peaks = [largest_entry(stack, (1, 2)).flatten() if stack.numel() else stack.new_zeros(len(stack)) for stack in stacks]
    if sum_ is not None:
        peaks = _summed(peaks, sum_)
    scales = [or_one(peak) for peak in peaks]
    scaled = [stack / scale[:, None, None] for stack, scale in zip(stacks, scales, strict=True)]
    alike = group_by(range(len(scaled)), lambda k: (max(scaled[k].shape[2], _SHORT), scaled[k].dtype, scaled[k].device))
    lots = [[scaled[k] for k in places] for places in alike.values()]
    parts = [_Lanczos(several, _start(several)) for several in lots]
    for _ in range(steps):
        products = [part.products() for part in parts]
        if sum_ is not None:
            products = _summed(products, sum_)
        for part, summed in zip(parts, products, strict=True):
            part.extend(summed)
    found: dict[int, Tensor] = {}
    for places, part in zip(alike.values(), parts, strict=True):
        found |= zip(places, part.norms().split([len(stack) for stack in part.stacks]), strict=True)
    return [found[k] * scale.cpu() for k, scale in enumerate(scales)]


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """`[count, columns]` of each below one another, with zeros up to the most columns."""
    most = max(part.shape[1] for part in parts)
    whole = [torch.nn.functional.pad(p, (0, most - p.shape[1])) if p.shape[1] < most else p for p in parts]
    return whole[0] if len(whole) == 1 else torch.cat(whole)


def _squared(stack: Tensor, vectors: Tensor) -> Tensor:
    """`A^T A` times the vectors `[count, columns]`, which may be padded."""
    left = _times(stack, vectors[:, : stack.shape[2], None])
    # Not `stack.mT @ left`, which a CPU takes 20 times as long for.
    return torch.bmm(left.mT, stack)[:, 0]


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """`matrices @ vectors`, `[count, rows, 1]`, which a CPU takes four to ten times as long for when written so."""
    if matrices.device.type == "cpu" and matrices[:1].numel() > _LARGE:
        pairs = zip(matrices, vectors[..., 0], strict=True)
        return torch.stack([torch.mv(matrix, vector) for matrix, vector in pairs])[..., None]
    return torch.bmm(vectors.mT, matrices.mT).mT


def _start(stacks: Sequence[Tensor]) -> Tensor:
    """Fixed vectors of unit length, that no structure of weights is likely to be orthogonal to; as `_Lanczos.right`."""
    like = stacks[0]
    vectors = {}
    for columns in {stack.shape[2] for stack in stacks}:
        phases = torch.arange(1, columns + 1, dtype=torch.float64, device="cpu") * (math.sqrt(5) - 1) / 2
        # No entry repeats: the golden ratio is far from every fraction.
        vector = 1.0 + (2 * math.pi * phases).sin()
        vectors[columns] = (vector / vector.norm()).to(like.device, like.dtype)
    return _padded([vectors[stack.shape[2]].repeat(len(stack), 1) for stack in stacks])


def _summed(parts: Sequence[Tensor], sum_: Sum) -> list[Tensor]:
    """Tensors added over processes in one exchange."""
    total = sum_(torch.cat([widened(part).flatten() for part in parts]))
    pieces = total.split([part.numel() for part in parts])
    return [piece.reshape(part.shape).to(part.dtype) for piece, part in zip(pieces, parts, strict=True)]
