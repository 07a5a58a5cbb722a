"""How the outputs change along an update, without noise or bias: to first order, in one forward-mode pass, or in all.

A custom `autograd.Function` or operator may have a backward and nothing else. Forward mode then loses what passes through
it without a word, as a forward does that takes another path where nothing requires gradients (bitsandbytes' 4-bit
product), and so does a second derivative through a backward that is once differentiable. Its first derivative is what the
model trains with, and `<u, J v> = <J^T u, v>` holds any derivative against it, for all tensors by one backward a probe:
an `Adjoint`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from layerwise.common.group_by import group_by
from layerwise.common.running import same_random_numbers
from layerwise.common.tensors import or_one, wide_dtype
from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.moments import TensorUpdate
from layerwise.function_space.measuring.outputs import Outputs, draw_probes, nodes_of

if TYPE_CHECKING:
    from layerwise.function_space.measuring.runners import Runner

#: The name of the outputs' own size among the changes.
OUTPUTS = ""
Tensors = Mapping[str, Tensor]
#: What a rate says it was measured with.
FORWARD, REVERSE = "exact", "exact, reverse"
#: The change of the outputs in the place of their values, what it was divided by, and how it was found.
Change = tuple[Outputs, Tensor, str]


def log_square(change: Outputs, scale: Tensor) -> Tensor:
    """Logarithm of the sum of squares of what counts of a change times its scale, a float64 scalar on the device."""
    values, wide = change.values.detach(), wide_dtype(change.values.device)
    values = values if change.mask is None else torch.where(change.mask, values, torch.zeros_like(values))
    return values.to(wide).square().sum().log() + 2 * scale.to(wide).log()


def exact_change(
    function: Callable[[Tensors], Outputs], points: Tensors, updates: Mapping[str, TensorUpdate], check: Adjoint | None
) -> Change:
    """The derivative at `points` along `updates` of a function of these tensors that gives the outputs.

    Raises:
        LayerwiseError: neither formula agrees with `check`.
    """
    scale = or_one(torch.stack([update.largest for update in updates.values()]).amax())
    found: list[Outputs] = []

    def values(tensors: Tensors) -> Tensor:
        found.append(function(tensors))
        return found[-1].values

    at = {name: points[name].detach() for name in updates}
    along = {name: (update.whole() / scale).to(at[name].dtype) for name, update in updates.items()}
    for tangent, formula in derivatives(values, at, along):
        if check is None or check.agrees(list(updates), tangent, scale):
            return replace(found[-1], values=tangent), scale, formula
    raise LayerwiseError(
        f"the exact derivative along {', '.join(map(repr, updates))} cannot be found: the forward runs an autograd "
        "function or operator that has a backward, but neither a forward-mode formula nor a second derivative; "
        "use method='full_cov', or beside method='difference' linear='full_cov'"
    )


def derivatives(function: Callable[[Any], Tensor], points: Tensors, along: Tensors) -> Iterator[tuple[Tensor, str]]:
    """`d/dt function(points + t * along)` at 0, by forward-mode differentiation and then twice in reverse, and which it is.

    Some operations lack a forward-mode formula. The second way then takes the gradient along `u` of the outputs' gradient
    (which is linear in `u`), along the direction.
    """
    # The fused attention kernels have neither formula; the plain one has both.
    for derivative, formula in ((_forward, FORWARD), (_twice_reverse, REVERSE)):
        with sdpa_kernel(SDPBackend.MATH), _PlainOperations():
            tangent = derivative(function, points, along)
        if tangent is not None:
            yield tangent, formula


def _forward(function: Callable[[Any], Tensor], points: Tensors, along: Tensors) -> Tensor | None:
    """None where an operation has no formula."""
    try:
        with torch.no_grad():
            tangent: Tensor = torch.func.jvp(function, (dict(points),), (dict(along),))[1]
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    return tangent


def _twice_reverse(function: Callable[[Any], Tensor], points: Tensors, along: Tensors) -> Tensor:
    leaves = {name: point.detach().requires_grad_() for name, point in points.items()}
    with torch.enable_grad():
        values = function(leaves)
        if not values.requires_grad:
            return torch.zeros_like(values)
        u = torch.zeros_like(values, requires_grad=True)
        found = torch.autograd.grad(values, list(leaves.values()), u, create_graph=True, allow_unused=True)
        pairs = [(g, along[name]) for name, g in zip(leaves, found, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros_like(values)
        gradients, directions = zip(*pairs, strict=True)
        (tangent,) = torch.autograd.grad(gradients, u, directions, allow_unused=True)
    return torch.zeros_like(values) if tangent is None else tangent


class _PlainOperations(TorchFunctionMode):
    """Operations that have neither a forward-mode formula nor a second derivative, written with those that have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding_bag:
            return _embedding_bag(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _embedding_bag(*args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.embedding_bag` by an embedding and a sum, mean or maximum over each bag."""
    given = inspect.signature(torch.nn.functional.embedding_bag).bind(*args, **kwargs)
    given.apply_defaults()
    input, weight, offsets, max_norm, norm_type, _, mode, _, word_weights, include_last_offset, padding_idx = given.args
    words = input.reshape(-1)
    if input.ndim == 2:
        bag = torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1])
        bags = len(input)
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        bags = len(starts)
        bag = torch.searchsorted(starts, torch.arange(len(words), device=input.device), right=True) - 1
    rows = torch.nn.functional.embedding(words, weight, None, max_norm, norm_type)
    counted = torch.ones_like(words, dtype=torch.bool) if padding_idx is None else words != padding_idx % len(weight)
    if mode == "max":
        held = [rows[(bag == number) & counted] for number in range(bags)]
        return torch.stack([each.max(0).values if len(each) else rows.new_zeros(rows.shape[1]) for each in held])
    weights = counted.to(rows.dtype)
    if word_weights is not None:
        weights = weights * word_weights.reshape(-1)
    sums = rows.new_zeros(bags, rows.shape[1]).index_add(0, bag, rows * weights[:, None])
    if mode == "sum":
        return sums
    sizes = rows.new_zeros(bags).index_add(0, bag, counted.to(rows.dtype))
    return sums / sizes.clamp(min=1)[:, None]


# A part that was lost is missed only where all of these probes are nearly at right angles to it.
_PROBES = 4
# Of the derivative's size: far above what bfloat16 rounds, and below the noise of 64 probes.
_TOLERANCE = 0.05
# Of the largest tensor's gradient, entry by entry: derivatives that are 0 but for rounding (a key's bias).
_ROUNDING = 0.01


@dataclass(frozen=True)
class Adjoint:
    """Products of random signs with the derivatives along updates, by reverse mode.

    Attributes:
        signs: one tensor of the outputs' shape a probe, 0 where an entry does not count.
        slopes: by tensor, `<J^T u, v>` under each probe.
        floors: by tensor, how large a slope rounding may make under each probe.
    """

    signs: Sequence[Tensor]
    slopes: Mapping[str, Tensor]
    floors: Mapping[str, Tensor]

    def agrees(self, names: Sequence[str], tangent: Tensor, scale: Tensor) -> bool:
        """Whether `tangent * scale` is the derivative along these updates. NaN is no disagreement: it shows by itself."""
        wide = wide_dtype(tangent.device)
        counted = torch.where(self.signs[0] != 0, tangent, torch.zeros_like(tangent)).to(wide) * scale.to(wide)
        forward = torch.stack([(signs * counted).sum() for signs in self.signs])
        reverse = torch.stack([self.slopes[name] for name in names]).sum(0)
        floor = torch.stack([self.floors[name] for name in names]).sum(0).square().mean().sqrt()
        error = (forward - reverse).square().mean().sqrt()
        return not bool(error > _TOLERANCE * torch.linalg.vector_norm(counted) + floor)


def adjoint(
    function: Callable[[Mapping[str, Tensor]], Outputs], points: Mapping[str, Tensor], updates: Mapping[str, TensorUpdate]
) -> Adjoint | None:
    """What to hold derivatives of `function` along `updates` against; None where torch differentiates all of it itself."""
    leaves = {name: points[name].detach().requires_grad_() for name in updates}
    with torch.enable_grad():
        outputs = function(leaves)
    values = outputs.values
    # A backward of a custom function, in Python or C++.
    if not any(isinstance(node, BackwardCFunction) or "CppNode" in node.name() for node in nodes_of(values)):
        return None
    wide = wide_dtype(values.device)
    sizes = [u.whole().to(wide_dtype(u.new.device)).square().mean().sqrt() for u in updates.values()]
    all_signs, slopes, floors = [], [], []
    for signs in draw_probes(outputs, _PROBES, seed=0):
        found = torch.autograd.grad(values, list(leaves.values()), signs, retain_graph=True, allow_unused=True)
        grads = {name: g.to(wide) for name, g in zip(leaves, found, strict=True) if g is not None}
        norms = [torch.linalg.vector_norm(g).to(values.device) for g in grads.values()]
        largest = torch.stack(norms).amax() if norms else values.new_zeros((), dtype=wide)
        all_signs.append(signs)
        along = {name: (g * updates[name].whole().to(g.device, g.dtype)).sum() for name, g in grads.items()}
        slopes.append([along[name].to(largest) if name in along else 0.0 for name in updates])
        floors.append([largest * size.to(largest) * _ROUNDING for size in sizes])
    by_name = [torch.tensor(rows, dtype=wide, device=values.device).T for rows in (slopes, floors)]
    return Adjoint(all_signs, *(dict(zip(updates, rows, strict=True)) for rows in by_name))


def exact_changes(runner: Runner, batch: Any, mask: Tensor | None) -> Iterator[tuple[str, Change]]:
    """The outputs' derivative along each update."""
    with same_random_numbers(runner.model):
        check = runner.adjoint(batch, mask) if runner.updates else None
    for name, updates in together(runner).items():
        with same_random_numbers(runner.model):
            change = runner.derivative(batch, mask, updates, check)
        yield name, change


def differences(runner: Runner, batch: Any, mask: Tensor | None) -> Iterator[tuple[str, Change]]:
    """The outputs with each update less those without; first, under no name, those without.

    Layers that draw random numbers draw the same ones each time.
    """
    with same_random_numbers(runner.model):
        before = runner.changed(batch, mask, {})
    one = torch.ones((), device=before.values.device)
    yield OUTPUTS, (before, one, "difference")
    for name, updates in together(runner).items():
        with same_random_numbers(runner.model):
            after = runner.changed(batch, mask, updates)
        yield name, (replace(after, values=after.values - before.values), one, "difference")
        del after


#: What each method of this kind takes for the outputs' change.
CHANGES = {"exact": exact_changes, "difference": differences}


def together(runner: Runner) -> Mapping[str, Mapping[str, TensorUpdate]]:
    """The updates that are applied at once, under the name that their rate has."""
    names = group_by(runner.updates, runner.settings.together or str)  # or each by itself
    return {label: {name: runner.updates[name] for name in several} for label, several in names.items()}


def root_mean(log_squares: list[float]) -> float:
    """The root of the mean of squares given as logarithms: a rate over several batches of equal weight."""
    if any(math.isnan(value) for value in log_squares):
        return math.nan
    peak = max(log_squares)
    if peak == -math.inf:
        return 0.0
    mean = sum(math.exp(value - peak) for value in log_squares) / len(log_squares)
    return math.exp(0.5 * (peak + math.log(mean)))
