"""From one tensor's update and its probe gradients to its function-space learning rate.

With `Z = dW * g` (elementwise; `g` the gradient of one probe, `E eps eps^T = I`) the rate of one tensor is built from
means over probes of a few scalars, its *moments*:

    total   (sum Z)^2                           E[total] is the squared rate, without any assumption
    square  sum Z^2
    K_d     sum of squares of Z summed over d

Every estimator of arXiv 2502.17405 is a product of powers of these means, so an estimator is a table of exponents, and one
formula serves the value and its standard error. Moments are kept as logarithms: updates of 1e-12 times gradients of 1e-10
are far below what float32 can square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch
from torch import Tensor

from layerwise.common.tensors import is_sharded, largest_entry, local_part, or_one, wide_dtype, widened

# Rows are taken in pieces of about this many entries: on a CPU a piece then stays in cache for all its sums, and the
# temporary never grows with the tensor (an embedding can be a third of a model).
_CPU_PIECE = 1 << 17
_GPU_PIECE = 1 << 24


@dataclass(frozen=True)
class Estimator:
    """`value^2 = prod over moments of mean(moment)^exponent`, on the tensor seen in the shape `view`.

    Attributes:
        name: what a rate says it was measured with.
        view: the shape, of rank 2 or more.
        exponents: of the total alone; or of the square, and then of K_0, K_1, ... if they are used.
        total: whether the total is the moment.
        per_dim: whether the K_d are used.
    """

    name: str
    view: tuple[int, ...]
    exponents: tuple[int, ...] = (1,)
    total: bool = False
    per_dim: bool = False


def full_cov(shape: tuple[int, ...]) -> Estimator:
    """`E[(sum Z)^2]`: unbiased, noisy: relative standard error about 1 / sqrt(2 probes)."""
    return Estimator("full_cov", (shape[0] if shape else 1, math.prod(shape[1:])), total=True)


def iid(shape: tuple[int, ...]) -> Estimator:
    """`E[sum Z^2]`: low by a factor that depends on the width, so never for transfer across widths."""
    return Estimator("iid", (shape[0] if shape else 1, math.prod(shape[1:])))


def kronecker(view: tuple[int, ...]) -> Estimator:
    """`prod_d K_d / square^(D-1)`, literally, for a tensor of any rank D >= 2."""
    return Estimator("kronecker", view, (1 - len(view), *[1] * len(view)), per_dim=True)


def kronecker_of_matrices(shape: tuple[int, ...]) -> Estimator:
    """Kronecker for matrices, as in the paper, and the unbiased `full_cov` elsewhere.

    For vectors and scalars the two are the same, and from rank 3 on Kronecker's assumption fails (see
    docs/function-space.md).
    """
    return kronecker(shape) if len(shape) == 2 else full_cov(shape)


#: What each method estimates a tensor of some shape with. A new estimator is a function above and a line here.
ESTIMATORS: dict[str, Callable[[tuple[int, ...]], Estimator]] = {
    "kronecker": kronecker_of_matrices,
    "full_cov": full_cov,
    "iid": iid,
}


@dataclass(frozen=True)
class TensorUpdate:
    """`dW` of one tensor: `new` itself, or `new - old`.

    The difference is formed piece by piece in float32 (float64 for float64 weights), so it costs no memory. Of sharded
    tensors (DTensors) take the `block` that this process holds first.

    Attributes:
        new: the weights after the step, or dW.
        old: the weights before it.
        decay: this much of the old weights was taken off by weight decay that is no part of dW (`steps/named_rates.py`).
    """

    new: Tensor
    old: Tensor | None = None
    decay: float = 0.0

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision that dW is formed in."""
        return torch.float64 if self.new.dtype == torch.float64 else torch.float32

    def rows(self, rows: slice = slice(None)) -> Tensor:
        """Some rows of dW (of a scalar: itself as one row)."""
        delta = _with_rows(self.new)[rows].to(self.dtype)
        if self.old is not None:
            old = _with_rows(self.old)[rows]
            delta = delta - old
            if self.decay:
                delta = delta.add_(old.to(self.dtype), alpha=self.decay)
        return delta

    def pieces(self, width: int = 1) -> list[slice]:
        """Rows few enough to work on `width` gradients at a time, all of them in turn."""
        if not self.new.numel():
            return []
        count = self.new.shape[0] if self.new.ndim else 1
        limit = _CPU_PIECE if self.new.device.type == "cpu" else _GPU_PIECE
        step = max(1, limit // max(1, width * (self.new.numel() // count)))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def applied(self, point: Tensor) -> Tensor:
        """The tensor after this update alone, from `point`, in its precision."""
        if self.old is not None and not self.decay:
            return self.new.detach()
        found = torch.empty_like(point)
        for rows in self.pieces():
            _with_rows(found)[rows] = _with_rows(point)[rows].to(self.dtype) + self.rows(rows)
        return found

    def part(self, rows: slice) -> TensorUpdate:
        """The update of some rows alone."""
        return self._each(lambda t: _with_rows(t)[rows])

    def block(self, dim: int = 0) -> TensorUpdate:
        """What this process holds of a sharded tensor's update, its dimension `dim` put first; any other as it is."""
        if not is_sharded(self.new):
            return self
        return self._each(lambda t: local_part(t.detach()).movedim(dim, 0) if t.ndim else local_part(t.detach()))

    def _each(self, function: Callable[[Tensor], Tensor]) -> TensorUpdate:
        return TensorUpdate(function(self.new), None if self.old is None else function(self.old), self.decay)

    def whole(self) -> Tensor:
        """dW as one tensor, in the parameter's shape."""
        return self.rows().reshape(self.new.shape)

    @cached_property
    def largest(self) -> Tensor:
        """The largest absolute entry, a scalar on the tensor's device."""
        peaks = [largest_entry(self.rows(rows)) for rows in self.pieces()]
        if len(peaks) == 1:
            return peaks[0]
        return torch.stack(peaks).amax() if peaks else self.new.new_zeros((), dtype=self.dtype)

    @torch.no_grad()
    def redo(self, change: float) -> None:
        """Write the step at `change` times its rate into `new`, piece by piece: `W = old - decay * old + change * dW`.

        A step is proportional to its rate, so nothing of the optimizer is run again, and its state, which does not depend
        on the rate, stays as it is.
        """
        assert self.old is not None
        new, old = _with_rows(self.new), _with_rows(self.old)
        for rows in self.pieces():
            before = old[rows].to(self.dtype) * (1.0 - self.decay)
            new[rows].copy_(before.add_(self.rows(rows), alpha=change))


def _with_rows(tensor: Tensor) -> Tensor:
    """The tensor, without its graph; a scalar as one row."""
    return tensor.detach() if tensor.ndim else tensor.detach()[None]  # `atleast_1d` takes five times as long


@dataclass(eq=False)
class Moments:
    """The moments of one tensor under probes, kept on the device until the end.

    Products are formed of numbers of order one: the update over its largest entry, and where they are squared, gradients
    over the largest of the first one. The scales come back in as logarithms.

    Attributes:
        scales: of the update, and where products are squared of gradients; once the first gradients came.
        log_scale: what they add to log moments.
        found: logarithms of the moments, a row a probe, in float64 where the device has it.
    """

    estimator: Estimator
    update: TensorUpdate
    scales: list[Tensor] = field(default_factory=list)
    log_scale: Tensor | float = 0.0
    found: list[Tensor] = field(default_factory=list)

    def add(self, grads: Tensor) -> None:
        """Take the gradients of some probes, `[..., *shape]`, in any float dtype."""
        leading = grads.ndim - self.update.new.ndim
        sums = self.sums(grads.flatten(0, leading - 1) if leading > 1 else grads)
        self.take(sums, self.log_scale)

    def sums(self, grads: Tensor) -> Tensor:
        """`[probes, sums]`: the sums of Z and its squares that moments are made of, additive over blocks of rows.

        They are: the total; or the squares, those of Z summed over each dimension but the first, and Z summed over the
        first (`view[1:]`, still to be squared: only there do blocks of rows meet).
        """
        grads = grads if grads.ndim > 1 else grads[:, None]
        if not self.scales:
            self.scales = [or_one(self.update.largest)]
            if not self.estimator.total:
                largest = largest_entry(grads[0]) if grads.numel() else grads.new_zeros(())
                self.scales.append(or_one(largest.to(self.update.dtype)))
            wide = wide_dtype(grads.device)
            self.log_scale = reduce(torch.mul, [scale.to(wide) for scale in self.scales]).log() * 2
        pieces = self.update.pieces(len(grads))
        if not pieces:
            return grads.new_zeros(len(grads), self.count, dtype=self.update.dtype)
        return reduce(torch.add, (self._piece(grads[:, rows], self.update.rows(rows)) for rows in pieces))

    def _piece(self, grads: Tensor, delta: Tensor) -> Tensor:
        """The sums of some rows of dW."""
        delta = reduce(torch.div, self.scales, delta)
        if self.estimator.total:
            return torch.mv(grads.flatten(1).to(delta.dtype), delta.flatten())[:, None]
        z = (grads * delta).reshape(len(grads), len(delta), *self.estimator.view[1:])
        found = [_squares(z)]
        if self.estimator.per_dim:
            found += [_squares(z.sum(dim + 1)) for dim in range(1, len(self.estimator.view))]
            found.append(z.sum(1).flatten(1))
        return torch.cat(found, 1)

    def unscaled_sums(self, grads: Tensor) -> Tensor:
        """The same without scales, which differ between processes; in float64, which has room for squares."""
        scaled = widened(self.sums(grads))
        scale = reduce(torch.mul, [widened(s) for s in self.scales])
        if self.estimator.total:
            return scaled * scale
        squares = len(self.estimator.view) if self.estimator.per_dim else 1
        return torch.cat([scaled[:, :squares] * scale.square(), scaled[:, squares:] * scale], 1)

    def take(self, sums: Tensor, log_scale: Tensor | float) -> None:
        """Make sums of whole tensors into log moments, which `log_scale` is to be added to."""
        if self.estimator.per_dim:
            last = len(self.estimator.view)
            sums = torch.cat([sums[:, :1], _squares(sums[:, last:]), sums[:, 1:last]], 1)
        logs = widened(sums).abs().log()
        self.found.append((logs * 2 if self.estimator.total else logs) + log_scale)

    def logs(self, probes: int) -> Tensor:
        """Logarithms of the moments, `[probes, len(exponents)]`; -inf if no gradient came."""
        return torch.cat(self.found) if self.found else torch.full((probes, len(self.estimator.exponents)), -math.inf)

    @property
    def count(self) -> int:
        """How many numbers `sums` has for each probe."""
        view = self.estimator.view
        return len(view) + math.prod(view[1:]) if self.estimator.per_dim else 1


def _squares(x: Tensor) -> Tensor:
    """`[probes, 1]`: the sum of squares of each of `[probes, ...]`, without a tensor of squares."""
    # Not `bmm`, which adds one by one: it takes twenty times as long on a CPU, and is off by 2e-4 at 600,000 entries.
    return torch.linalg.vector_norm(x.flatten(1), dim=1, keepdim=True).square()


def combine(exponents: tuple[int, ...], moments: Tensor, weights: Tensor | None = None) -> list[tuple[float, float]]:
    """Rates and standard errors from the log moments of all probes.

    The standard error is the jackknife's over probes, taken on the logarithm of the rate, where the distribution is far
    closer to normal than that of a mean of squares. Probes of different slices are not told apart: how slices differ
    counts as noise, which errs on the safe side where few probes see a slice that matters. It is `nan` for one probe and 0
    for a rate of 0.

    Args:
        exponents: of each moment.
        moments: their logarithms, `[tensors, probes, len(exponents)]`.
        weights: one per probe, in place of the plain mean: of slices of unequal size, or the official code's exponential
            average.
    """
    moments = moments.cpu().double()
    probes = moments.shape[1]
    powers = torch.tensor(exponents, dtype=torch.float64, device="cpu")
    peak = moments.amax(1, keepdim=True)
    zero = (peak[..., powers > 0] == -math.inf).any(-1).flatten()
    peak = torch.where(zero[:, None, None], 0.0, peak)
    scaled = (moments - peak).exp()
    share = torch.full((probes,), 1 / probes, device="cpu").double() if weights is None else weights.double() / weights.sum()
    mean = (share[:, None] * scaled).sum(1, keepdim=True)
    values = (0.5 * ((mean.log() + peak) @ powers)).exp().flatten()
    values = torch.where(zero, 0.0, values)
    if probes == 1:
        return [(value, math.nan) for value in values.tolist()]
    # Leaving out the only probe that saw anything leaves nothing: the floor keeps its error huge, yet finite.
    without = ((mean - share[:, None] * scaled) / (1 - share[:, None])).clamp_min(1e-300)
    logs = 0.5 * ((without.log() + peak) @ powers)
    # For equal weights this is the jackknife's (probes - 1) / probes; for others each probe counts by its own.
    moved = (1 - share) * (logs - (share * logs).sum(1, keepdim=True))
    spread = moved.square().sum(1) * probes / (probes - 1)
    errors = torch.where(zero, 0.0, values * spread.sqrt())
    return list(zip(values.tolist(), errors.tolist(), strict=True))
