"""Whether a forward-mode derivative is right where the forward runs autograd functions that torch cannot see into.

A custom `autograd.Function` or operator may have a backward and nothing else. Forward mode then loses what passes through
it without a word, as a forward does that takes another path where nothing requires gradients (bitsandbytes' 4-bit
product), and so does a second derivative through a backward that is once differentiable. Its first derivative is what the
model trains with, and `<u, J v> = <J^T u, v>` holds any derivative against it, for all tensors by one backward a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from layerwise.common.tensors import wide_dtype
from layerwise.function_space.measuring.moments import TensorUpdate
from layerwise.function_space.measuring.outputs import Outputs, nodes_of

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
    function: Callable[[Mapping[str, Tensor]], Outputs],
    points: Mapping[str, Tensor],
    updates: Mapping[str, TensorUpdate],
) -> Adjoint | None:
    """What to hold derivatives of `function` along `updates` against; None where torch differentiates all of it itself."""
    leaves = {name: points[name].detach().requires_grad_() for name in updates}
    with torch.enable_grad():
        outputs = function(leaves)
    values = outputs.values
    # A backward of a custom function, in Python or C++.
    if not any(isinstance(node, BackwardCFunction) or "CppNode" in node.name() for node in nodes_of(values)):
        return None
    generator = torch.Generator(values.device).manual_seed(0)
    wide = wide_dtype(values.device)
    all_signs, slopes, floors = [], [], []
    for _ in range(_PROBES):
        signs = torch.randint(0, 2, values.shape, generator=generator, device=values.device) * 2 - 1
        signs = (signs if outputs.mask is None else signs * outputs.mask).to(values.dtype)
        found = torch.autograd.grad(values, list(leaves.values()), signs, retain_graph=True, allow_unused=True)
        grads = {name: g.to(wide) for name, g in zip(leaves, found, strict=True) if g is not None}
        norms = [torch.linalg.vector_norm(g).to(values.device) for g in grads.values()]
        largest = torch.stack(norms).amax() if norms else values.new_zeros((), dtype=wide)
        all_signs.append(signs)
        slopes.append([_slope(grads.get(name), update).to(largest) for name, update in updates.items()])
        floors.append([largest * _rms(update).to(largest) * _ROUNDING for update in updates.values()])
    by_name = [torch.tensor(rows, dtype=wide, device=values.device).T for rows in (slopes, floors)]
    return Adjoint(all_signs, *(dict(zip(updates, rows, strict=True)) for rows in by_name))


def _slope(grad: Tensor | None, update: TensorUpdate) -> Tensor:
    direction = update.whole()
    if grad is None:
        return torch.zeros((), device=direction.device)
    return (grad * direction.to(grad.device, grad.dtype)).sum()


def _rms(update: TensorUpdate) -> Tensor:
    direction = update.whole().to(wide_dtype(update.new.device))
    return direction.square().mean().sqrt()
