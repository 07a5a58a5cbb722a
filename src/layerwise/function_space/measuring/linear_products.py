"""Moments of a weight matrix from what its gradient is the product of, without ever forming that gradient whole.

Where a weight is used once, in `x W^T` (`nn.Linear`) or `x W` (transformers' `Conv1D`), a probe's gradient is `G^T X` (or
`X^T G`), `G` being the gradient of the product `[positions, out]` and `X` its input `[positions, in]`. `full_cov` then
needs no gradient at all: `sum(dW * G^T X) = sum(G * X dW^T)`, with a product that all probes share. The others take the
gradient in pieces of rows, used while they are in cache: the memory of the largest tensor's gradient is saved.

The product in the forward is replaced by one with a further input of three numbers a slice, whose "gradient" is the log
moments. So they come out of autograd as gradients do, batched over probes too.

Slices of a batch that are run side by side (`vmap`) have one graph, and weights of their own in it: what a probe on each
of them needs then comes from one backward. Of a product the weight is the same for all of them, so it stays one product, and
attention has a fused kernel that `vmap` would call for each slice: `Products._in_all_slices` goes from the one slice that
the model sees to the tensors of all of them, and back. What it uses of torch is private; where it fails, slices are run one
by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from layerwise.common.tensors import largest_entry, or_one, wide_dtype
from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.moments import Moments
from layerwise.function_space.measuring.outputs import nodes_of


@dataclass(eq=False, kw_only=True)
class ProductMoments(Moments):
    """The moments of a weight that come ready, as the gradients of its product's further input.

    Attributes:
        by_output: whether the weight's rows belong to outputs (`x W^T`), not to inputs (`x W`).
        moved: for `full_cov`, what the update over its scale makes of the inputs over theirs, the same for all probes.
    """

    by_output: bool
    moved: Tensor | None = None

    def of_factors(self, grads: Tensor, inputs: Tensor) -> Tensor:
        """The gradient of `moments_input` under one probe, from `[slices, positions, out]` and `[slices, positions, in]`.

        For `full_cov` the sums of `Z` over `exp(log_scale / 2)`, and else log moments.
        """
        wide = wide_dtype(grads.device)
        if self.estimator.total:
            moved = self._moved(inputs) if self.moved is None else self.moved
            totals = (grads.to(self.update.dtype) * moved).sum((1, 2))
            return totals.to(wide)[:, None].expand(-1, 3)
        # Products of numbers of order one, without a copy of the inputs.
        largest, peak, reach = (_scale(x) for x in (self.update.largest, largest_entry(grads), largest_entry(inputs)))
        left, right = (grads[0] / peak / reach, inputs[0])
        if not self.by_output:
            left, right = right, left
        found = torch.stack(self._by_pieces(left, right, largest)).to(wide).log()
        logs = found + sum(2 * s.to(wide).log() for s in (largest, peak, reach))
        return torch.cat([logs, logs.new_zeros(3 - len(found))])[None]

    def _moved(self, inputs: Tensor) -> Tensor:
        """Set `moved`, `[slices, positions, out]`, and what its scale adds to log moments."""
        update, wide = self.update, wide_dtype(inputs.device)
        largest, reach = _scale(update.largest), _scale(largest_entry(inputs))
        self.log_scale = 2 * (largest.to(wide).log() + reach.to(wide).log())
        inputs, scale = inputs.to(update.dtype), largest * reach
        if self.by_output:
            parts = [inputs @ (update.rows(rows) / scale).T for rows in update.pieces()]
            self.moved = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)  # `cat` of one copies it
            return self.moved
        self.moved = inputs.new_zeros(*inputs.shape[:-1], update.new.shape[1])
        for rows in update.pieces():
            self.moved += inputs[..., rows] @ (update.rows(rows) / scale)
        return self.moved

    def _by_pieces(self, left: Tensor, right: Tensor, largest: Tensor) -> list[Tensor]:
        """Square sums of `Z = dW * left^T right` and of its sums over either dimension, in the estimator's order."""
        update, per_dim = self.update, self.estimator.per_dim
        square = by_row = columns = left.new_zeros((), dtype=update.dtype)
        for rows in update.pieces():
            delta = update.rows(rows) / largest
            z = (left[:, rows].T @ right).to(delta.dtype) * delta
            square = square + _square(z)
            if per_dim:
                columns = columns + z.sum(0)
                by_row = by_row + _square(z.sum(1))
        return [square, _square(columns), by_row] if per_dim else [square]

    def add(self, grads: Tensor) -> None:
        """Take those of some probes, `[..., 3]`."""
        found = grads.flatten(0, -2)[:, : len(self.estimator.exponents)]
        if self.estimator.total:
            self.take(found, self.log_scale)
        else:
            self.found.append(found)


def _square(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return torch.dot(flat, flat)


def _scale(largest: Tensor) -> Tensor:
    """The scale of numbers up to `largest`: itself, or 1 for 0; a power of two in half precision, to round nothing."""
    if largest.dtype in (torch.bfloat16, torch.float16):
        largest = largest.log2().ceil().exp2()
    return or_one(largest)


class _Multiply(torch.autograd.Function):
    """The product with a weight called `name`, whose backward gives log moments where it is measured.

    They come as the gradient of a further input, `moments_input`, `[slices, 3]`, once the node in the graph has `moments`,
    which make them; the weight then gets nothing. Of slices side by side all arguments have their dimension first. What
    comes out is no view, as models write into it.
    """

    @staticmethod
    def forward(
        ctx: Any, moments_input: Tensor, name: str, by_output: bool, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        one = weight if weight.ndim == 2 else weight[0]  # slices have the same one each
        one = one if by_output else one.T
        ctx.weight_name, ctx.by_output, ctx.shape = name, by_output, weight.shape
        ctx.moments_input, ctx.moments = moments_input, None
        ctx.save_for_backward(x, one)
        rows = x.reshape(-1, x.shape[-1])
        if bias is None or bias.ndim == 1 or bias.stride(0) == 0:  # the same for all slices
            found = torch.nn.functional.linear(rows, one, bias if bias is None or bias.ndim == 1 else bias[0])
            return torch.ops.aten._unsafe_view(found, [*x.shape[:-1], len(one)])
        return torch.nn.functional.linear(x, one).add_(bias.reshape(len(bias), *[1] * (x.ndim - 2), -1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, one = ctx.saved_tensors
        to_x = grad @ one if ctx.needs_input_grad[3] else None
        grads, inputs = (t.reshape(len(ctx.moments_input), -1, t.shape[-1]) for t in (grad, x))
        to_bias = grads.sum(1) if ctx.needs_input_grad[5] else None
        if to_bias is not None and len(ctx.shape) == 2:
            to_bias = to_bias[0]
        if ctx.moments is not None:
            return ctx.moments.of_factors(grads, inputs), None, None, to_x, None, to_bias
        left, right = (grads, inputs) if ctx.by_output else (inputs, grads)
        return None, None, None, to_x, (left.mT @ right).view(ctx.shape), to_bias


#: The functions that make products; each gives the input, weight and bias among its arguments.
_PRODUCTS: dict[Any, Callable[..., tuple[Tensor, Tensor, Tensor | None]]] = {
    torch.nn.functional.linear: lambda input, weight, bias=None: (input, weight, bias),
    torch.addmm: lambda input, mat1, mat2: (mat1, mat2, input),
}
#: What a model may ask of a tensor's graph.
OF_GRAPHS = {getattr(torch.Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf")}


class Products(TorchFunctionMode):
    """While a forward runs under it, products with these leaves can be measured.

    Args:
        leaves: by name.
        count: how many slices are run side by side, by a `vmap` around it.
    """

    def __init__(self, leaves: Mapping[str, Tensor], count: int = 1) -> None:
        super().__init__()
        self.names = {id(leaf): name for name, leaf in leaves.items() if leaf.ndim == 2 and type(leaf) is Tensor}
        self.count = count
        self.level: Any = _functorch.maybe_current_level()  # None: the batch as it is

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Checkpointing has them: it runs the forward again without us, and would take what that saves for what we saved.
        saves_by_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if self.level and saves_by_hooks:
            raise LayerwiseError("checkpointing would run the forward again outside of the vmap: slices are run one by one")
        if func in _PRODUCTS and torch.is_grad_enabled() and not saves_by_hooks:
            found = self._multiplied(func, args, kwargs)
            if found is not None:
                return found
        if self.level and func is torch.nn.functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if self.level and func in OF_GRAPHS:
            return self._answer(func, *args)
        return func(*args, **kwargs)

    def _multiplied(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The product with a leaf; None where it is none, or not differentiated as it stands: under autocast, or a vmap of
        the model's own.
        """
        try:
            x, weight, bias = _PRODUCTS[func](*args, **kwargs)
        except TypeError:  # scaled, or written into a tensor that is there
            return None
        # An expert without tokens has an empty product, whose scale would be that of nothing. What `addmm` adds need not
        # be a bias.
        if id(weight) not in self.names or not x.numel() or (bias is not None and bias.ndim != 1):
            return None
        device = weight.device
        if _functorch.maybe_current_level() != self.level or torch.is_autocast_enabled(device.type):
            return None
        # No estimator of a matrix has more moments than three.
        moments_input = torch.zeros(self.count, 3, dtype=wide_dtype(device), device=device, requires_grad=True)
        multiply = partial(_Multiply.apply, moments_input, self.names[id(weight)], func is torch.nn.functional.linear)
        return self._in_all_slices(multiply, x, weight, bias)

    def _in_all_slices(self, function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        """One slice's part of a function of the `[slices, ...]` that these are one slice's parts of."""
        if not self.level:
            return function(*tensors)
        whole = [None if t is None else _functorch._remove_batch_dim(t, self.level, self.count, 0) for t in tensors]
        with temporarily_pop_interpreter_stack():
            found = function(*whole)
        return _functorch._add_batch_dim(found, 0, self.level)

    def _answer(self, getter: Any, tensor: Tensor) -> Any:
        """What a model that asks for `requires_grad` is told outside: `vmap` says False of everything.

        Raises:
            NotImplementedError: for what else it asks of the graph.
        """
        if getter != torch.Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
            raise NotImplementedError("a slice has no graph of its own")
        while _functorch.is_functorch_wrapped_tensor(tensor):
            tensor = _functorch.get_unwrapped(tensor)
        return tensor.requires_grad

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        """`scaled_dot_product_attention`, where it has no mask with slices for further examples."""
        attention: Any = torch.nn.functional.scaled_dot_product_attention
        inner = _functorch.maybe_current_level() != self.level
        if inner or args or options.get("attn_mask") is not None or any(t.ndim != 4 for t in (query, key, value)):
            return attention(query, key, value, *args, **options)

        def at_once(*whole: Tensor) -> Tensor:
            return attention(*(t.flatten(0, 1) for t in whole), **options).unflatten(0, (self.count, -1))

        return self._in_all_slices(at_once, query, key, value)


def only_products(values: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """The nodes of products that can be measured, by the leaf: those leaves that the graph of `values` uses there alone."""
    nodes = list(nodes_of(values))
    products = {node.weight_name: node for node in nodes if getattr(node, "_forward_cls", None) is _Multiply}
    places: dict[Node, str] = {get_gradient_edge(leaves[name]).node: name for name in products}
    uses = Counter(places[following] for node in nodes for following, _ in node.next_functions if following in places)
    return {name: product for name, product in products.items() if uses[name] == 1}
