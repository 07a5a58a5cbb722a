"""Operations that move entries about: views, copies, `cat`, writing in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layerwise.geometry.forward.addresses import written_out
from layerwise.geometry.forward.flow import Flow, Operation, Origin, expanded, joined


def replay(flow: Flow, op: Operation) -> None:
    """Views and other moves of entries: done with the addresses as well."""
    origin = flow.origin(op.tensors[0])
    if origin is None:
        return
    weights = [_moved(op, addresses) for addresses in origin.weights]
    rows = [_moved(op, addresses) for addresses in origin.rows]
    for index, result in enumerate(op.results):
        there, made = (
            tuple(moved[index] for moved in each if moved[index].shape == result.shape) for each in (weights, rows)
        )
        flow.came_from(result, replace(origin, weights=there, rows=made))


def _moved(op: Operation, addresses: Tensor) -> list[Tensor]:
    arguments: list[Any] = [arg.cpu() if isinstance(arg, Tensor) else arg for arg in op.args[1:]]
    if op.name in _COPIES:  # which on the meta device would begin a storage of their own
        addresses = written_out(addresses)
    try:
        out = op.func(addresses, *arguments, **op.kwargs)
    except RuntimeError:
        if op.name not in ("view", "_unsafe_view"):
            raise
        out = written_out(addresses).reshape(arguments[0])
    return list(out) if isinstance(out, (tuple, list)) else [out]


def join(flow: Flow, op: Operation) -> None:
    """`cat` and `stack`: rows side by side, -1 where a tensor has none."""
    given = [(tensor, flow.origin(tensor) or Origin()) for tensor in op.args[0] if tensor.shape != (0,)]
    if len(given) == 1 and op.name == "cat":  # as einops packs a single tensor
        flow.made(op, given[0][1])
        return
    mixed = not all(origin.constant for _, origin in given)
    flow.used((origin for _, origin in given), "table" if mixed else "other")
    if not mixed:
        numbers = [origin.results_of | flow.matrices(origin) for _, origin in given]
        flow.made(op, Origin(constant=True, results_of=frozenset[int]().union(*numbers)))
        return
    dim = op.argument("dim") or 0
    most = max(len(origin.rows) for _, origin in given)
    rows = []
    for index in range(most):
        parts = [
            origin.rows[min(index, len(origin.rows) - 1)]
            if origin.rows
            else torch.full((1,) * tensor.ndim, -1, device="cpu").expand(tensor.shape)
            for tensor, origin in given
        ]
        rows.append(_joined(op, parts, dim))
    result = joined([replace(origin, rows=()) for _, origin in given], op.results[0].shape, flow.evidence.transformed)
    flow.made(op, replace(result, rows=tuple(rows)))


def _joined(op: Operation, parts: list[Tensor], dim: int) -> Tensor:
    """Joined where the rows vary, and expanded along the dimensions where they do not."""
    stacked = op.name == "stack"
    shape = op.results[0].shape
    dim %= len(shape)
    for axis in range(parts[0].ndim):
        alike = all(part.ndim == parts[0].ndim and part.stride(axis) == 0 for part in parts)
        if alike and (stacked or axis != dim or len(parts) == 1):
            parts = [part.narrow(axis, 0, min(1, part.shape[axis])) for part in parts]
    return op.func(parts, dim).expand(shape)


def copy(flow: Flow, op: Operation) -> None:
    """Written in place: the target now comes from the source."""
    target, source = op.args[:2]
    origin = flow.origin(source)
    if origin is None or (origin.constant and not origin.weights):
        return
    flow.used([origin], "table")
    rows = [r for r in (expanded(addresses, target.shape) for addresses in origin.rows) if r is not None]
    flow.came_from(target, replace(origin, rows=tuple(rows), weights=(), constant=False))


def complex_pairs(flow: Flow, op: Operation) -> None:
    """Two rows make a complex number, and each of its parts comes from both."""
    origin = flow.origin(op.tensors[0])
    if origin is not None:
        flow.used([origin], "other")
        apart = op.name == "view_as_complex"
        rows = [
            addresses.select(-1, part) if apart else addresses.unsqueeze(-1).expand(op.results[0].shape)
            for addresses in origin.rows
            for part in range(2 if apart else 1)
        ]
        flow.made(op, replace(origin, weights=(), rows=tuple(rows)))


_COPIES = ("repeat", "flip", "roll", "repeat_interleave", "tile", "expand_copy", "view_copy", "narrow_copy")
MOVES: dict[str, Callable[[Flow, Operation], None]] = {
    **dict.fromkeys((*_COPIES, "_unsafe_view", "_reshape_alias", "unfold"), replay),
    **dict.fromkeys(("cat", "stack"), join),
    **dict.fromkeys(("view_as_complex", "view_as_real"), complex_pairs),
    "copy": copy,
}
