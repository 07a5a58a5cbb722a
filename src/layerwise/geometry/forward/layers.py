"""Operations that are whole layers: normalisations, convolutions, attention, gated units."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from layerwise.geometry.forward.addresses import constant_along, first_along, small, written_out
from layerwise.geometry.forward.evidence import Site
from layerwise.geometry.forward.flow import Flow, Operation
from layerwise.geometry.forward.origins import Origin, expanded, results_in


def norm(flow: Flow, op: Operation) -> None:
    """Normalisations: gains and biases are used; what goes through was transformed, unless there is no gain."""
    gain = op.argument("weight")
    for parameter in (gain, op.argument("bias")):
        if isinstance(parameter, Tensor):
            for weight in (flow.origin(parameter) or Origin()).weights:
                flow.evidence.used(weight, "norm")
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
    source, kernel = flow.origin(x) or Origin(), flow.origin(weight) or Origin()
    groups, transposed = op.argument("groups"), bool(op.argument("transposed"))
    _biases(flow, op.tensors[2:])
    result = op.results[0]
    channels = result.ndim - (weight.ndim - 2) - 1
    rows = []
    for view in kernel.weights if kernel.constant else ():
        kernel_size = tuple(view.shape[2:])
        flow.evidence.used(view, "convolution", groups=groups, transposed=transposed, kernel=kernel_size)
        taps = written_out(view.flatten(2)[..., 0] if view.ndim > 2 else view)
        outputs = taps.unflatten(0, (groups, -1))[:, 0].flatten() if transposed else taps[:, 0]
        steps = [-1 if dim == channels else 1 for dim in range(result.ndim)]
        rows.append(outputs.view(steps).expand(result.shape))
        flow.evidence.transformed |= source.results_of
    if not rows:
        flow.transformed_by(kernel, source)
    results_of = kernel.results_of | (flow.numbers(kernel) if rows else frozenset())
    if groups == x.shape[channels] == result.shape[channels]:
        rows += _through_filters(source, channels, result)
    else:
        flow.evidence.went(source.rows, Site(op.number, 0))
    results_of |= source.results_of - flow.evidence.transformed
    flow.came_from(result, Origin(rows=tuple(rows), results_of=results_of))


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
    origins = [flow.origin(tensor) or Origin() for tensor in op.tensors]
    for operand, (origin, part) in enumerate(zip(origins, "qkv", strict=False)):
        flow.evidence.went(origin.rows, Site(op.number, operand, part))
    _biases(flow, op.tensors[3:])
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
    direction, gain = (flow.origin(tensor) or Origin() for tensor in op.tensors[:2])
    for weight in gain.weights:
        flow.evidence.used(weight, "gain")
    flow.came_from(op.results[0], direction)


def _biases(flow: Flow, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        for weight in (flow.origin(tensor) or Origin()).weights:
            flow.evidence.used(weight, "bias")


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
