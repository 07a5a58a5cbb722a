"""Operations that are whole layers: normalisations, convolutions, attention, gated units, matrix products.

Of a product: which dimension of a weight maps out and which in, and which rows meet in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from layerwise.geometry.forward.addresses import constant_along, first_along, first_of_rows, small, written_out
from layerwise.geometry.forward.evidence import Side, Site
from layerwise.geometry.forward.flow import CONSTANT, Flow, Operation, Origin, expanded, is_of_features, joined, results_in


def norm(flow: Flow, op: Operation) -> None:
    """Normalisations: gains and biases are used; what goes through was transformed, unless there is no gain."""
    gain = op.argument("weight")
    flow.used(flow.origins(p for p in (gain, op.argument("bias")) if isinstance(p, Tensor)), "norm")
    origin = flow.origin(op.tensors[0])
    if origin is None:
        return
    if gain is not None:
        flow.evidence.transformed |= origin.results_of
    results_of = origin.results_of - flow.evidence.transformed
    flow.came_from(op.results[0], replace(origin, results_of=results_of, normalised=True))


def convolution(flow: Flow, op: Operation) -> None:
    """A convolution. A depthwise one keeps its inputs' rows, channel by channel."""
    x, weight = op.tensors[:2]
    source, kernel = flow.origins((x, weight))
    groups, transposed = op.argument("groups"), bool(op.argument("transposed"))
    flow.used(flow.origins(op.tensors[2:]), "bias")
    result = op.results[0]
    channels = result.ndim - (weight.ndim - 2) - 1
    size = tuple(weight.shape[2:])
    flat = size.count(1) == len(size) and not transposed and flow.has_flat(kernel)
    rows = []
    for view in kernel.weights:
        if flat:
            _blocks(flow, op, view, 0, groups)
        else:
            flow.evidence.used(view, "convolution", groups=groups, transposed=transposed, kernel=size)
        taps = written_out(view.flatten(2)[..., 0] if view.ndim > 2 else view)
        outputs = taps.unflatten(0, (groups, -1))[:, 0].flatten() if transposed else taps[:, 0]
        steps = [-1 if dim == channels else 1 for dim in range(result.ndim)]
        rows.append(outputs.view(steps).expand(result.shape))
        flow.evidence.transformed |= source.results_of
    if flat and flow.numbers(source) & flow.factors:  # they make a weight of an adapter
        for view in source.weights:
            _blocks(flow, op, view, channels, groups)
        flow.came_from(result, Origin(constant=True, results_of=flow.numbers(source) | flow.numbers(kernel)))
        return
    flow.used([source], "table")
    if not rows:
        flow.transformed_by(kernel, source)
    results_of = kernel.results_of | (flow.numbers(kernel) if rows else frozenset())
    if groups == x.shape[channels] == result.shape[channels]:
        rows += _through_filters(source, channels, result)
    else:
        for addresses in source.rows:
            _went_apart(flow, op, addresses, channels, groups if flat else 1)
    results_of |= source.results_of - flow.evidence.transformed
    flow.came_from(result, Origin(rows=tuple(rows), results_of=results_of))


def _blocks(flow: Flow, op: Operation, view: Tensor, out: int, groups: int) -> None:
    """A matrix in a convolution of size one, each group of whose channels is one of its own: loralib's fused adapters."""
    sides: list[Side] = ["stack"] * view.ndim
    sides[out : out + 2] = ["out", "in"]
    flow.evidence.product(view, sides)
    _went_apart(flow, op, first_of_rows(view, out + 1), out, groups)


def _went_apart(flow: Flow, op: Operation, rows: Tensor, dim: int, groups: int) -> None:
    """Results of rows went to the groups of a convolution."""
    for group, some in enumerate(rows.chunk(groups, dim)):
        flow.evidence.went([some], Site(op.number, group))


def _through_filters(source: Origin, channels: int, result: Tensor) -> list[Tensor]:
    """Rows that go on through a depthwise convolution, which mixes places and not channels."""
    rows = []
    for addresses in source.rows:
        places = range(channels + 1, result.ndim)
        if constant_along(addresses, places):
            for dim in places:
                addresses = first_along(addresses, dim, result.shape[dim])
            rows.append(addresses)
    return rows


def attention(flow: Flow, op: Operation) -> None:
    """Attention in one operation: queries, keys and values come first, and the rows of the values come out."""
    origins = flow.origins(op.tensors)
    for operand, (origin, part) in enumerate(zip(origins, "qkv", strict=False)):
        flow.evidence.went(origin.rows, Site(op.number, operand, part))
    flow.used(origins[3:], "bias")
    out = op.results[0]
    rows = []
    for addresses in origins[2].rows:
        if addresses.ndim == out.ndim and out.ndim > 2:
            repeats = out.shape[-3] // max(1, addresses.shape[-3])
            addresses = small(first_along(addresses, -2, 1))
            if addresses.shape[-3] > 1 and repeats > 1:
                addresses = addresses.repeat_interleave(repeats, -3)
            rows.append(expanded(addresses, out.shape))
    results_of = results_in(origins) - flow.evidence.transformed
    fitting = tuple(addresses for addresses in rows if addresses is not None)
    flow.came_from(out, Origin(rows=fitting, results_of=results_of))


def glu(flow: Flow, op: Operation) -> None:
    """`a * sigmoid(b)` of the two halves."""
    origin = flow.origin(op.tensors[0]) or Origin()
    dim = op.argument("dim")
    halves = [addresses.chunk(2, -1 if dim is None else dim) for addresses in origin.rows]
    for value, gate in halves:
        flow.evidence.went([value], Site(op.number, 0, "up"))
        flow.evidence.went([gate], Site(op.number, 1, "gate"))
    flow.came_from(op.results[0], replace(origin, rows=tuple(value for value, _ in halves)))


def weight_norm(flow: Flow, op: Operation) -> None:
    """torch's own `g v / |v|`: the weight is `v`, and `g` its gain."""
    direction, gain = flow.origins(op.tensors[:2])
    flow.used([gain], "gain")
    flow.came_from(op.results[0], direction)


_NORMS = (
    "native_layer_norm layer_norm native_group_norm group_norm native_batch_norm batch_norm cudnn_batch_norm rms_norm "
    "_native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_no_update "
    "_fused_rms_norm miopen_batch_norm"
)
#: The rule of each, by the operation's name. Attention has many names: every operation that has the word in it.
LAYERS: dict[str, Callable[[Flow, Operation], None]] = {
    **dict.fromkeys(_NORMS.split(), norm),
    **dict.fromkeys(("convolution", "_convolution", "mkldnn_convolution"), convolution),
    **dict.fromkeys(("_weight_norm_interface", "_weight_norm"), weight_norm),
    "glu": glu,
}


@dataclass(frozen=True)
class Operand:
    """One side of a product: the tensor, and which of its dimensions is contracted, free, and of a batch."""

    tensor: Tensor
    inner: int  # its contracted dimension
    free: int | None  # the dimension that stays, None of a vector
    side: int  # 0 on the left, 1 on the right: where its free dimension stands in the result

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
    origins = flow.origins((left.tensor, right.tensor))
    if (
        None in (left.free, right.free)
        and all(origin.constant for origin in origins)
        and not all(origin.weights for origin in origins)
    ):  # a weight and the vectors by which spectral_norm finds its norm
        flow.came_from(result, CONSTANT)
        return
    held = [bool(origin.weights) for origin in origins]
    if all(held) and any(flow.numbers(origin) & flow.factors for origin in origins):  # they make a weight of an adapter
        for view in origins[0].weights:
            flow.evidence.product(view, left.sides("out", "in"))
        for view in origins[1].weights:
            flow.evidence.product(view, right.sides("in", "out"))
        flow.came_from(result, Origin(constant=True, results_of=flow.numbers(origins[0]) | flow.numbers(origins[1])))
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
    flow.used([source], "table")
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
    origins = flow.origins(tensors)
    for origin in origins:
        for view in origin.weights:
            flow.evidence.used(view, "norm" if is_of_features(view, [product]) else "bias")
    return [origin for origin in origins if not origin.constant]


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
