"""Rates without noise or bias: the derivative of the outputs along each tensor's update, one forward-mode pass each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.common.tensors import or_one, wide_dtype
from layerwise.function_space.measuring.moments import TensorUpdate
from layerwise.function_space.measuring.outputs import Outputs


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


@dataclass(frozen=True)
class Derivative:
    """The derivative of the outputs along an update divided by `scale`, in the place of the outputs' values."""

    outputs: Outputs
    scale: Tensor

    def log_square(self) -> Tensor:
        """Logarithm of the sum of squares of the output change, a float64 scalar on the device."""
        tangent, mask = self.outputs.values.detach(), self.outputs.mask
        wide = wide_dtype(tangent.device)
        tangent = tangent if mask is None else torch.where(mask, tangent, torch.zeros_like(tangent))
        return tangent.to(wide).square().sum().log() + 2 * self.scale.to(wide).log()


def exact_derivative(
    function: Callable[[Tensor], Outputs], point: Tensor, update: TensorUpdate
) -> Derivative:
    """Of `function`, which gives the outputs with one tensor replaced, at `point` along `update`."""
    scale = or_one(update.largest)
    found: list[Outputs] = []

    def values(tensor: Tensor) -> Tensor:
        found.append(function(tensor))
        return found[-1].values

    tangent = derivative(values, point.detach(), (update.whole() / scale).to(point.dtype))
    return Derivative(replace(found[-1], values=tangent), scale)


def rate_of(log_squares: list[float]) -> float:
    """The rate over several batches of equal weight: the root of the mean square."""
    if any(math.isnan(value) for value in log_squares):
        return math.nan
    peak = max(log_squares)
    if peak == -math.inf:
        return 0.0
    mean = sum(math.exp(value - peak) for value in log_squares) / len(log_squares)
    return math.exp(0.5 * (peak + math.log(mean)))
