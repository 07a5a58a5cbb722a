"""Moments of a weight matrix from what its gradient is the product of, without ever forming that gradient whole.

Where a weight is used once, in `x W^T` (`nn.Linear`) or `x W` (transformers' `Conv1D`), a probe's gradient is `G^T X` (or
`X^T G`), `G` being the gradient of the product `[positions, out]` and `X` its input `[positions, in]`. `full_cov` then
needs no gradient at all: `sum(dW * G^T X) = sum(G * X dW^T)`, with a product that all probes share. The others take the
gradient in pieces of rows, used while they are in cache: the memory of the largest tensor's gradient is saved.

The product in the forward is replaced by one with a further input of three numbers, whose "gradient" is the log moments.
So they come out of autograd as gradients do, batched over probes too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from layerwise.common.tensors import or_one, wide_dtype
from layerwise.function_space.measuring.moments import Collector, Estimator, Moments, Sink, TensorUpdate
from layerwise.function_space.measuring.outputs import Outputs
from layerwise.function_space.measuring.probes import probes_at_once, run_probes
from layerwise.function_space.measuring.runners import LeafRunner


class ProductRunner(LeafRunner):
    """A runner, on one process, that measures weights used in one product alone from its factors.

    Those of `full_cov` always; the others where there is no room for whole gradients of several probes, which are
    quicker to square.
    """

    def outputs(
        self, batch: Any, mask: Tensor | None, replaced: Mapping[str, Tensor] | None = None
    ) -> Outputs:
        with Products(self.leaves):
            return super().outputs(batch, mask, replaced)

    def probe(self, outputs: Outputs, probes: Iterator[Tensor], sink: Sink, memory: int) -> None:
        assert isinstance(sink, Collector)
        tight = probes_at_once(outputs, self.leaves, memory) == 1
        products = {
            name: product
            for name, product in only_products(outputs.values, self.leaves).items()
            if tight or sink.moments[name].estimator.total
        }
        leaves = {**self.leaves, **{name: product.moments_input for name, product in products.items()}}
        first = list(islice(probes, probes_at_once(outputs, leaves, memory)))
        for name, product in products.items():
            moments = sink.moments[name]
            product.measure(moments.estimator, moments.update, len(first))
            sink.moments[name] = ReadyMoments(moments.estimator, moments.update)
        probes = chain(first, probes)
        del first
        run_probes(outputs, leaves, probes, sink, memory)


class Product:
    """One product with a weight.

    Attributes:
        name: the weight's.
        by_output: whether its rows belong to outputs (`x W^T`), not to inputs (`x W`).
        moments_input: a further input of the product, whose gradient the log moments come as.
        measured: what with, once `measure` was called.
    """

    def __init__(self, name: str, weight: Tensor, by_output: bool) -> None:
        self.name, self.by_output = name, by_output
        # No estimator of a matrix has more moments than three.
        self.moments_input = torch.zeros(
            3, dtype=wide_dtype(weight.device), device=weight.device, requires_grad=True
        )
        self.measured: tuple[Estimator, TensorUpdate, int] | None = None
        # The inputs, or for `full_cov` what the update makes of them, and their scale: the same for all probes.
        self._seen: tuple[Tensor, Tensor] | None = None

    def measure(self, estimator: Estimator, update: TensorUpdate, probes: int) -> None:
        """From now on give log moments to `moments_input`, for at most so many probes together, and the weight nothing."""
        self.measured = estimator, update, probes

    def log_moments(self, grads: Tensor, inputs: Tensor) -> Tensor:
        """The gradient of `moments_input` under one probe, from `[positions, out]` and `[positions, in]`."""
        assert self.measured is not None
        estimator, update, probes = self.measured
        largest, peak = _scale(update.largest), _scale(grads.abs().amax())
        if self._seen is None:
            seen = self._moved(inputs.to(update.dtype), update, largest) if estimator.total else inputs
            self._seen = seen, _scale(seen.abs().amax())
        seen, reach = self._seen
        if estimator.total:
            found = [((grads / peak).to(update.dtype) * (seen / reach)).sum().square()]
        else:
            # Products of numbers of order one, without a copy of the inputs.
            left, right = (grads / peak / reach, inputs) if self.by_output else (inputs, grads / peak / reach)
            found = _by_pieces(estimator, update, left, right, largest, probes)
        wide = self.moments_input.dtype
        logs = torch.stack(found).to(wide).log() + sum(2 * s.to(wide).log() for s in (largest, peak, reach))
        return torch.cat([logs, logs.new_zeros(3 - len(found))])

    def _moved(self, inputs: Tensor, update: TensorUpdate, largest: Tensor) -> Tensor:
        """The product of the inputs and the update over its largest entry, `[positions, out]`."""
        if self.by_output:
            return torch.cat([inputs @ (update.rows(*piece) / largest).T for piece in update.pieces()], dim=1)
        moved = inputs.new_zeros(inputs.shape[0], update.new.shape[1])
        for start, stop in update.pieces():
            moved.addmm_(inputs[:, start:stop], update.rows(start, stop) / largest)
        return moved


def _by_pieces(
    estimator: Estimator, update: TensorUpdate, left: Tensor, right: Tensor, largest: Tensor, probes: int
) -> list[Tensor]:
    """Square sums of `Z = dW * left^T right` and of its sums over either dimension, in the estimator's order."""
    square = by_row = columns = left.new_zeros((), dtype=update.dtype)
    for start, stop in update.pieces(probes):
        delta = update.rows(start, stop) / largest
        z = (left.narrow(1, start, stop - start).T @ right).to(delta.dtype) * delta
        square = square + _square(z)
        if estimator.per_dim:
            columns = columns + z.sum(0)
            by_row = by_row + _square(z.sum(1))
    return [square, _square(columns), by_row] if estimator.per_dim else [square]


def _square(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return torch.dot(flat, flat)


def _scale(largest: Tensor) -> Tensor:
    """The scale of numbers up to `largest`: itself, or 1 for 0; a power of two in half precision, to round nothing."""
    if largest.dtype in (torch.bfloat16, torch.float16):
        largest = largest.log2().ceil().exp2()
    return or_one(largest)


class _Multiply(torch.autograd.Function):
    """The product, whose backward gives log moments where it is measured."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, moments_input: Tensor, product: Product
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return torch.nn.functional.linear(x, weight if product.by_output else weight.T, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, weight = ctx.saved_tensors
        product: Product = ctx.product
        to_x = (grad @ (weight if product.by_output else weight.T)) if ctx.needs_input_grad[0] else None
        grads, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        to_bias = grads.sum(0) if ctx.needs_input_grad[2] else None
        if product.measured is not None:
            return to_x, None, to_bias, product.log_moments(grads, inputs), None
        left, right = (grads, inputs) if product.by_output else (inputs, grads)
        return to_x, left.T @ right, to_bias, None, None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    return input, weight, bias


def _addmm(input: Any, mat1: Any = None, mat2: Any = None, *_: Any, **scaled: Any) -> tuple[Any, ...]:
    return (None, None, None) if scaled or _ else (mat1, mat2, input)


def _plain(device: str) -> bool:
    """Whether a product run now is differentiated as it stands.

    Not under autocast or vmap; nor under hooks on saved tensors, as checkpointing has them: it runs the forward again
    without us, and would take what that saves for what we saved.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    functorch = torch._C._are_functorch_transforms_active()
    return hooks is None and not functorch and not torch.is_autocast_enabled(device)


# Input, weight and bias in the arguments of the functions that make products.
_PRODUCTS: dict[Any, Callable[..., tuple[Any, ...]]] = {
    torch.nn.functional.linear: _linear,
    torch.addmm: _addmm,
}


class Products(TorchFunctionMode):
    """While a forward runs under it, products with these leaves can be measured."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {
            id(leaf): name for name, leaf in leaves.items() if leaf.ndim == 2 and type(leaf) is Tensor
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        parts = _PRODUCTS.get(func) if torch.is_grad_enabled() else None
        if parts is not None:
            x, weight, bias = parts(*args, **(kwargs or {}))
            # An expert without tokens has an empty product, whose scale would be that of nothing. What `addmm` adds
            # need not be a bias.
            ours = weight is not None and id(weight) in self.names and x.numel() > 0
            if ours and (bias is None or bias.ndim == 1) and _plain(weight.device.type):
                product = Product(self.names[id(weight)], weight, func is torch.nn.functional.linear)
                return _Multiply.apply(x, weight, bias, product.moments_input, product)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def only_products(values: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Product]:
    """The leaves that the graph of `values` uses once, and in a product that can be measured."""
    places: dict[Node, str] = {get_gradient_edge(leaf).node: name for name, leaf in leaves.items()}
    uses: Counter[str] = Counter()
    products: dict[str, Product] = {}
    stack = [values.grad_fn] if values.grad_fn is not None else []
    seen: set[Node] = set(stack)
    while stack:
        node = stack.pop()
        product = getattr(node, "product", None)
        if isinstance(product, Product):
            products[product.name] = product
        for following, _ in node.next_functions:
            if following is None:
                continue
            if following in places:
                uses[places[following]] += 1
            elif following not in seen:
                seen.add(following)
                stack.append(following)
    return {name: product for name, product in products.items() if uses[name] == 1}


class ReadyMoments(Moments):
    """The moments of a tensor that come ready, as the gradients of a product's further input."""

    def add(self, grads: Tensor) -> None:
        """Take the log moments of some probes, `[probes, 3]`."""
        self.probes.append(grads[:, : len(self.estimator.exponents)])

    def logs(self, probes: int) -> Tensor:
        return torch.cat(self.probes) if self.probes else super().logs(probes)
