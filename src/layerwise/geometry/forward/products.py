"""Matrix products: which dimension of a weight maps out and which in, and which rows meet in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from layerwise.geometry.forward.addresses import constant_along, first_of_rows
from layerwise.geometry.forward.evidence import Side, Site
from layerwise.geometry.forward.flow import Flow, Operation
from layerwise.geometry.forward.origins import CONSTANT, Origin, is_of_features, joined


@dataclass(frozen=True)
class Operand:
    """One side of a product: the tensor, and which of its dimensions is contracted, free, and of a batch.

    Attributes:
        tensor: the operand.
        inner: its contracted dimension.
        free: the dimension that stays, None of a vector.
        side: 0 on the left, 1 on the right: where its free dimension stands in the result.
    """

    tensor: Tensor
    inner: int
    free: int | None
    side: int

    def sides(self, free: Side, inner: Side) -> list[Side]:
        """What each dimension does, given what the free and the contracted one do."""
        names: dict[int | None, Side] = {self.free: free, self.inner: inner}
        return [names.get(dim, "stack") for dim in range(self.tensor.ndim)]

    def placed(self, addresses: Tensor, result: Tensor) -> Tensor:
        """Addresses of this operand, the first along the contracted dimension, in the shape of the product."""
        rows = addresses.select(self.inner, 0)  # [..., free]
        if self.free is not None and result.ndim > 1:
            rows = rows.unsqueeze(-1) if self.side == 0 else rows.unsqueeze(-2)
        while rows.ndim > result.ndim:  # grouped products: the groups of rows are not told apart
            rows = rows.select(0, 0)
        return rows.expand(result.shape)


def multiply(flow: Flow, op: Operation, left: Operand, right: Operand, added: Iterable[Tensor] = ()) -> None:
    """A product of two tensors, to which others were added."""
    result = op.results[0]
    origins = [flow.origin(operand.tensor) or Origin() for operand in (left, right)]
    if (
        None in (left.free, right.free)
        and all(origin.constant for origin in origins)
        and not all(origin.weights for origin in origins)
    ):  # a weight and the vectors by which spectral_norm finds its norm
        flow.came_from(result, CONSTANT)
        return
    held = [bool(origin.constant and origin.weights) for origin in origins]
    if all(held) and _are_factors(flow, origins):
        for view in origins[0].weights:
            flow.evidence.product(view, left.sides("out", "in"))
        for view in origins[1].weights:
            flow.evidence.product(view, right.sides("in", "out"))
        flow.came_from(result, Origin(constant=True))
        return
    if all(held):
        table, mapping = (_likely_a_weight(flow, origin) for origin in origins)
        if table == mapping:
            flow.evidence.guessed |= flow.numbers(origins[0]) | flow.numbers(origins[1])
        held = [mapping < table, mapping >= table]  # as a rule the one on the right maps learned inputs
    if any(held):
        weight, other = (left, right) if held[0] else (right, left)
        outcome = _by_weight(flow, op, weight, origins[weight.side], other, origins[other.side])
    else:
        outcome = _of_activations(flow, op, (left, right), origins)
    flow.came_from(result, joined([outcome, *_added(flow, added, outcome)], result.shape, flow.evidence.transformed))


def _by_weight(flow: Flow, op: Operation, weight: Operand, made_of: Origin, other: Operand, source: Origin) -> Origin:
    """A weight maps an activation: the result has the weight's rows."""
    flow.evidence.went(source.rows, Site(op.number, other.side))
    flow.evidence.transformed |= source.results_of
    for table in source.weights:
        flow.evidence.used(table, "table")
    rows = []
    for view in made_of.weights:
        if other.tensor.ndim == view.ndim == 3 and view.stride(0):
            flow.evidence.went_apart(source.rows)
        flow.evidence.product(view, weight.sides("out", "in"))
        rows.append(weight.placed(first_of_rows(view, weight.inner), op.results[0]))
    return Origin(rows=tuple(rows), results_of=flow.numbers(made_of))


def _of_activations(flow: Flow, op: Operation, operands: tuple[Operand, Operand], origins: list[Origin]) -> Origin:
    """Rows end where they are contracted; along the other dimension they go on."""
    passed = []
    for operand, origin in zip(operands, origins, strict=True):
        if origin.constant:  # made of parameters in ways that are not followed, or of none
            flow.transformed_by(origin, origins[1 - operand.side])
        for addresses in origin.rows:
            goes_on = constant_along(addresses, [operand.inner])
            part = "v" if goes_on else "qk"[operand.side]
            flow.evidence.went([addresses], Site(op.number, operand.side, part))
            if goes_on:
                passed.append(operand.placed(addresses, op.results[0]))
    results_of = (origins[0].results_of | origins[1].results_of) - flow.evidence.transformed
    return Origin(rows=tuple(passed), results_of=results_of)


def _added(flow: Flow, tensors: Iterable[Tensor], product: Origin) -> list[Origin]:
    """The origins of what is added to a product; biases among them are noted."""
    origins = [flow.origin(tensor) or Origin() for tensor in tensors]
    for origin in origins:
        for view in origin.weights if origin.constant else ():
            flow.evidence.used(view, "norm" if is_of_features(view, [product]) else "bias")
    return [origin for origin in origins if not origin.constant]


def _are_factors(flow: Flow, origins: list[Origin]) -> bool:
    """Whether two weights that are multiplied are the factors of one adapter, which makes a weight of them."""
    return any(flow.numbers(origin) & flow.factors for origin in origins)


def _likely_a_weight(flow: Flow, origin: Origin) -> tuple[bool, bool]:
    """How likely one of two parameters that are multiplied is the weight, and not a table of learned inputs."""
    numbers = flow.numbers(origin)
    looked_up = any(use.kind == "lookup" for number in numbers for use in flow.evidence.uses.get(number, ()))
    return bool(numbers & flow.linear), not looked_up


def product(flow: Flow, op: Operation) -> None:
    """A product by the name of its operation: which of its arguments are multiplied, and along which dimensions."""
    at = 1 if op.name in _ADDED_TO else 0
    left, right = op.args[at : at + 2]
    added = op.args[:at] or (op.args[2:3] if op.name == "linear" else ())
    inner, free = _RIGHT.get(op.name, (-2, -1))
    operands = _operand(left, -1, -2, 0), _operand(right, inner, free, 1)
    multiply(flow, op, *operands, [each for each in added if isinstance(each, Tensor)])


def _operand(tensor: Tensor, inner: int, free: int, side: int) -> Operand:
    return Operand(tensor, inner % tensor.ndim, free % tensor.ndim if tensor.ndim > 1 else None, side)


_ADDED_TO = ("addmm", "_addmm_activation", "baddbmm")
#: The contracted and the free dimension of what stands on the right, where they are not the last but one and the last.
_RIGHT = {"linear": (-1, -2), "mv": (-1, -1), "dot": (-1, -1)}
PRODUCTS: dict[str, Callable[[Flow, Operation], None]] = dict.fromkeys(
    ("mm", "bmm", "mv", "dot", "linear", "_grouped_mm", "_scaled_mm", *_ADDED_TO), product
)
