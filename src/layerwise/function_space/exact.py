"""Rates without noise or bias: the derivative of the outputs along each tensor's update, one forward-mode
pass each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.function_space.estimators import TensorUpdate


def derivative(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor) -> Tensor:
    """`d/dt function(point + t * direction)` at 0, by forward-mode differentiation, or twice in reverse.

    Some operations lack a forward-mode formula. The second way then takes the gradient along `u` of the
    outputs' gradient (which is linear in `u`), along the direction.
    """
    # The fused attention kernels have neither formula; the plain one has both.
    with sdpa_kernel(SDPBackend.MATH):
        try:
            with torch.no_grad():
                tangent: Tensor = torch.func.jvp(function, (point,), (direction,))[1]
            return tangent
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return _twice_reverse(function, point, direction)


def _twice_reverse(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor) -> Tensor:
    leaf = point.detach().requires_grad_()
    with torch.enable_grad():
        values = function(leaf)
        if not values.requires_grad:
            return torch.zeros_like(values)
        u = torch.zeros_like(values, requires_grad=True)
        (gradient,) = torch.autograd.grad(values, leaf, u, create_graph=True, allow_unused=True)
        if gradient is None or not gradient.requires_grad:
            return torch.zeros_like(values)
        (tangent,) = torch.autograd.grad(gradient, u, direction, allow_unused=True)
    return torch.zeros_like(values) if tangent is None else tangent


def exact_log_squares(
    function: Callable[[str, Tensor], tuple[Tensor, Tensor | None]],
    points: Mapping[str, Tensor],
    updates: Mapping[str, TensorUpdate],
) -> dict[str, Tensor]:
    """Logarithm of the sum of squares of each tensor's output change, a float64 scalar on the device.

    `function(name, tensor)` gives outputs and mask with that one tensor replaced.
    """
    found = {}
    for name, update in updates.items():
        point = points[name].detach()
        largest = update.largest()
        scale = torch.where(largest == 0, torch.ones_like(largest), largest)
        masks: list[Tensor | None] = []

        def outputs(tensor: Tensor, name: str = name, masks: list[Tensor | None] = masks) -> Tensor:
            values, mask = function(name, tensor)
            masks.append(mask)
            return values

        tangent = derivative(outputs, point, (update.whole() / scale).to(point.dtype)).detach()
        mask = masks[-1]
        wide = torch.float32 if tangent.device.type == "mps" else torch.float64
        tangent = tangent if mask is None else torch.where(mask, tangent, torch.zeros_like(tangent))
        found[name] = tangent.to(wide).square().sum().log() + 2 * scale.to(wide).log()
    return found


def rate_of(log_squares: list[float]) -> float:
    """The rate over several batches of equal weight: the root of the mean square."""
    if any(math.isnan(value) for value in log_squares):
        return math.nan
    peak = max(log_squares)
    if peak == -math.inf:
        return 0.0
    return math.exp(
        0.5 * (peak + math.log(sum(math.exp(value - peak) for value in log_squares) / len(log_squares)))
    )
