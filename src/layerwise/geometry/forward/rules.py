"""What each operation of torch does to the rows and weights that go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import compress, zip_longest
from operator import not_
from typing import Any

import torch
from torch import Tensor

from layerwise.geometry.forward.addresses import LARGEST, constant_along, small, written_out
from layerwise.geometry.forward.evidence import Kind, Site
from layerwise.geometry.forward.flow import (
    CONSTANT,
    POSITIONS,
    Flow,
    Operation,
    Origin,
    expanded,
    is_of_features,
    joined,
    name_of,
    results_in,
)
from layerwise.geometry.forward.layers import LAYERS, PRODUCTS, attention
from layerwise.geometry.forward.moves import MOVES, replay

Rule = Callable[[Flow, Operation], None]

#: Entry by entry, but linear: a result that went through anything else is "bent".
_LINEAR = frozenset(
    {"add", "sub", "rsub", "mul", "div", "neg", "clone", "where", "masked_fill", "lerp", "addcmul", "addcdiv"}
)
_SCALES = frozenset({"mul", "div", "addcmul", "addcdiv", "multiply", "divide"})
#: Those that newer versions of torch give the tag of that name.
_REDUCTIONS = frozenset(
    {"all", "amax", "amin", "aminmax", "any", "argmax", "argmin", "count_nonzero", "linalg__powsum", "linalg_vector_norm"}
    | {"logsumexp", "max", "mean", "min", "nansum", "norm", "prod", "std", "std_mean", "sum", "var", "var_mean"}
)


def follow(flow: Flow, op: Operation) -> None:
    """Say where the results of an operation come from, and note what it shows of the parameters in it."""
    origins = [flow.origin(tensor) for tensor in op.tensors]
    if not any(origins) and op.tensors:
        return
    if all(origin is not None and origin.constant and not origin.weights for origin in origins):
        values = origins[:1] if _rule(op.func) is lookup else origins  # zeros stay zeros wherever they are read
        counts = op.name == "arange" or any(origin.counts for origin in filter(None, values))
        constant = POSITIONS if counts else CONSTANT
        flow.made(op, replace(constant, results_of=results_in(filter(None, origins))))
    else:
        _rule(op.func)(flow, op)
        if op.args and op.results[0] is op.args[0] and op.results[0]._is_view():
            flow.wrote(op.results[0])


@cache
def _rule(func: Any) -> Rule:
    name = name_of(func)
    if name in RULES:
        return RULES[name]
    if "attention" in name:
        return attention
    if torch.Tag.pointwise in func.tags:
        return pointwise
    if name in _REDUCTIONS:
        return reduction
    return replay if func.is_view else other


def pointwise(flow: Flow, op: Operation) -> None:
    """Entry by entry: rows stay where they are; a product with results of weights tells them from others."""
    shape = op.results[0].shape
    given = [(tensor, flow.origin(tensor) or Origin()) for tensor in op.tensors]
    if all(origin.constant for _, origin in given):
        learned = [tensor for tensor, origin in given if origin.weights or origin.results_of]
        outer = len(learned) > 1 and all(tensor.shape != shape for tensor in learned)
        kept = [w for tensor, origin in given for w in origin.weights if _fits(flow, tensor, w, shape, outer)]
        flow.made(op, Origin(tuple(kept), constant=True, results_of=results_in(origin for _, origin in given)))
        return
    activations = [origin for _, origin in given if not origin.constant]
    kind: Kind = "gain" if op.name in _SCALES else "bias"
    weights = [weight for _, origin in given for weight in origin.weights]
    by_hand = frozenset[int]()  # numbers of the weights in a matrix product that is written out
    for weight in weights:
        outer = any(not origin.constant and _is_outer(tensor, small(weight).shape) for tensor, origin in given)
        if kind == "gain" and outer:
            by_hand |= flow.numbers(Origin((weight,)))
        of_features = kind == "bias" and is_of_features(weight, activations)
        flow.evidence.used(weight, "other" if kind == "gain" and outer else "norm" if of_features else kind)
    if by_hand:
        flow.evidence.transformed |= results_in(activations)
    if op.name in _SCALES:
        _meet(flow, op, activations)
    result = joined(activations, shape, flow.evidence.transformed)
    result = replace(result, results_of=result.results_of | by_hand)
    result = replace(result, bent=result.bent or (op.name not in _LINEAR and bool(result.rows)))
    if kind == "gain":
        result = replace(
            result,
            scaled=any(o.scaled for o in activations) or any(weight.numel() > 1 for weight in weights),
            normalised=any(o.normalised for o in activations) or _normalise(activations),
        )
    if result.scaled and result.normalised:  # a normalisation with gains; logits may be scaled alone
        flow.evidence.transformed |= result.results_of
    flow.made(op, result)


def _is_outer(activation: Tensor, weight: torch.Size) -> bool:
    """Whether a product entry by entry multiplies each activation with several entries of a wide weight.

    So does a matrix product that is written out, `(x[..., None, :] * weight).sum(-1)`, also where the activations were
    repeated before, as in `cosine_similarity`.
    """
    pairs = list(zip_longest(reversed(weight), reversed(activation.shape), fillvalue=1))
    wide = [other for size, other in pairs if size > 1]
    if len(wide) < 2 or max(wide) == 1:
        return False
    return 1 in wide or _repeats(activation, [dim for dim in range(-len(weight), 0) if weight[dim] > 1])


def _repeats(activation: Tensor, dims: Sequence[int]) -> bool:
    """Whether an activation is the same all along one of these dimensions, and not everywhere."""
    try:
        repeated = [torch.equal(activation, activation.narrow(d, 0, 1).expand_as(activation)) for d in dims]
        return any(repeated) and not all(repeated)
    except RuntimeError:  # nothing is computed on the meta device, or of fake tensors
        return False


def _fits(flow: Flow, tensor: Tensor, weight: Tensor, shape: torch.Size, outer: bool) -> bool:
    """Whether a weight lives on in a larger expression of weights; a smaller one is a gain of the others.

    Not a matrix in an `outer` product with another weight, as `torch.kron` makes one: it maps.
    """
    if tensor.shape != shape:
        maps = outer and sum(size > 1 for size in small(weight).shape) > 1
        flow.evidence.used(weight, "other" if maps else "gain")
    return tensor.shape == shape


def _normalise(origins: Sequence[Origin]) -> bool:
    """Whether a product is of results and what the same results were pooled to."""
    pooled = results_in(origin for origin in origins if origin.pooled)
    return any(not origin.pooled and origin.results_of & pooled for origin in origins)


def _meet(flow: Flow, op: Operation, origins: Sequence[Origin]) -> None:
    """Rows that are multiplied with results of weights: a gate and what it lets through, a scale and what it scales."""
    if len(origins) < 2 or op.tensors[0] is op.tensors[1]:
        return
    one, two = origins[:2]
    if not all(origin.rows or origin.results_of for origin in (one, two)):
        return  # a rotary embedding, say, multiplies with what no weight made
    for operand, origin in enumerate((one, two)):
        name = ("gate" if origin.bent else "up") if one.bent or two.bent else ""
        flow.evidence.went(origin.rows, Site(op.number, operand, name))


def reduction(flow: Flow, op: Operation) -> None:
    """Sums and the like: rows live on where all entries that are put together have the same one."""
    origin = flow.origin(op.tensors[0]) or Origin()
    if origin.constant:
        flow.made(op, CONSTANT)
        return
    dims = op.argument("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(op.tensors[0].ndim))
    kept = [rows for rows in origin.rows if rows.ndim and constant_along(rows, dims)]
    results_of = origin.results_of - flow.evidence.transformed
    for result in op.results:
        rows = [_without(rows, dims, result) for rows in kept]
        flow.came_from(result, replace(origin, rows=tuple(rows), results_of=results_of, pooled=True))


def _without(rows: Tensor, dims: Sequence[int], result: Tensor) -> Tensor:
    for dim in sorted((d % rows.ndim for d in dims), reverse=True):
        rows = rows.narrow(dim, 0, 1) if result.ndim == rows.ndim else rows.select(dim, 0)
    return rows


def same(flow: Flow, op: Operation) -> None:
    """The first result is the first tensor again, entry by entry: a copy, dropout, another precision."""
    origin = flow.origin(op.tensors[0])
    if origin is not None and op.results[0].shape == op.tensors[0].shape:
        flow.made(op, origin)


def softmax(flow: Flow, op: Operation) -> None:
    """What is normalised together belongs together, wherever it goes then: the scores of a router, one an expert."""
    same(flow, op)
    origin = flow.origin(op.results[0])
    if origin is not None:
        apart = [constant_along(rows, [op.argument("dim")]) for rows in origin.rows]
        flow.evidence.went(compress(origin.rows, map(not_, apart)), Site(op.number, 0))
        flow.made(op, replace(origin, rows=tuple(compress(origin.rows, apart)), bent=True))


def pad(flow: Flow, op: Operation) -> None:
    """What is put around has no rows."""
    origin = flow.origin(op.tensors[0])
    if origin is not None and origin.constant:
        other(flow, op)
    elif origin is not None:
        rows = [torch.constant_pad_nd(addresses, op.args[1], -1) for addresses in origin.rows]
        flow.made(op, replace(origin, weights=(), rows=tuple(rows)))


def lookup(flow: Flow, op: Operation) -> None:
    """An embedding: rows of a table by number. Of a stack of matrices, some of them."""
    origin = flow.origin(op.tensors[0]) or Origin()
    if not origin.weights:
        _gathered(flow, op, origin)
        return
    if op.tensors[0].ndim > 2 and _picks_matrices(op):
        some = [expanded(weight.select(0, 0), op.results[0].shape) for weight in origin.weights]
        flow.made(op, Origin(tuple(weight for weight in some if weight is not None), constant=True))
        return
    numbers = flow.origins(op.tensors[1:])
    if op.name.startswith("_embedding"):  # whose other tensors say where its bags begin
        numbers = numbers[:1]
    constant = all(each.constant for each in numbers)
    counted = constant and any(each.counts for each in numbers)
    layer = bool(flow.numbers(origin) & flow.linear)
    reordered = op.name != "embedding" and op.results[0].ndim == op.tensors[0].ndim
    chosen = _permuted(op, origin) if (constant and op.name != "embedding") or (layer and reordered) else []
    if layer and not chosen and (constant or reordered):
        other(flow, op)
        return
    flow.used([origin], "lookup", counted=counted)
    flow.made(op, Origin(tuple(chosen), constant=constant or bool(chosen)))


def _picks_matrices(op: Operation) -> bool:
    """Whether entries are picked along the first dimension alone: `w[numbers]`, `w.index_select(0, numbers)`."""
    return (op.name == "index" and len(op.args[1]) == 1) or (op.name == "index_select" and op.argument("dim") == 0)


def _permuted(op: Operation, origin: Origin) -> list[Tensor]:
    """The addresses of entries of weights that are chosen once each and keep their dimensions: other orders of rows."""
    result, weight = op.results[0], op.tensors[0]
    if result.ndim != weight.ndim or result.numel() > weight.numel() or weight.numel() > LARGEST:
        return []
    chosen = _picked(op, map(written_out, origin.weights))
    return [each for each in chosen if len(each.unique()) == each.numel()]


def _gathered(flow: Flow, op: Operation, origin: Origin) -> None:
    """Chosen entries of an activation: its rows too, where the choice is at hand, and is not one of rows by results.

    A router picks the scores of the experts that it chose: that one is chosen and another is not makes them no parts.
    """
    results_of = origin.results_of - flow.evidence.transformed
    if not all(each.constant for each in flow.origins(op.tensors[1:])):
        origin = replace(origin, constant=False, counts=False)
    if any(not (flow.origin(tensor) or CONSTANT).constant for tensor in op.tensors[1:]):
        dims = _chosen(op)
        kept = tuple(addresses for addresses in origin.rows if constant_along(addresses, dims))
        origin = replace(origin, rows=kept)
    rows = tuple(_picked(op, origin.rows))
    flow.made(op, replace(origin, rows=rows, results_of=results_of, weights=()))


def _picked(op: Operation, given: Iterable[Tensor]) -> list[Tensor]:
    """The addresses that are chosen, none where the choice is not at hand."""
    if op.name.startswith("_") or any(tensor.is_meta for tensor in op.tensors):
        return []
    at_hand = [
        [i if i is None else i.cpu() for i in arg] if isinstance(arg, (list, tuple)) else arg
        for arg in (arg.cpu() if isinstance(arg, Tensor) else arg for arg in op.args[1:])
    ]
    return [op.func(addresses, *at_hand) for addresses in given]


def _chosen(op: Operation) -> list[int]:
    """The dimensions along which entries are chosen."""
    if not op.name.endswith("index"):
        return [op.args[1]] if isinstance(op.args[1], int) else [0]
    dims: list[int] = []
    start = 0
    for index in op.args[1]:
        width = index.ndim if index is not None and index.dtype == torch.bool else 1
        dims += range(start, start + width) if index is not None else ()
        start += width
    return dims


def other(flow: Flow, op: Operation) -> None:
    """Anything else: every operand is a place of its own where rows end, and weights may be those of a layer."""
    origins = flow.origins(op.tensors)
    results_of = results_in(origins)
    weights = frozenset[int]().union(*map(flow.matrices, origins))
    for operand, origin in enumerate(origins):
        flow.evidence.went(origin.rows, Site(op.number, operand, known=False))
    flow.used(origins, "other")
    if weights:
        flow.evidence.transformed |= results_of
    constant = all(origin.constant for origin in origins)
    flow.made(op, Origin(constant=constant, results_of=results_of - flow.evidence.transformed | weights))


def fresh(flow: Flow, op: Operation) -> None:
    """Made in the shape of another tensor, and of nothing in it."""
    flow.made(op, CONSTANT)


_FRESH = "new_empty new_zeros new_ones new_full empty_like zeros_like ones_like full_like rand_like randn_like"
_SAME = "_to_copy clone native_dropout dropout cumsum cumprod detach alias tril triu"
RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), same),
    **dict.fromkeys(("_softmax", "softmax", "_log_softmax", "log_softmax"), softmax),
    **dict.fromkeys(("embedding", "_embedding_bag", "_embedding_bag_forward_only"), lookup),
    **dict.fromkeys(("index", "index_select", "gather", "_unsafe_index"), lookup),
    **dict.fromkeys(_FRESH.split(), fresh),
    "as_strided": other,
    "constant_pad_nd": pad,
    **MOVES,
    **LAYERS,
    **PRODUCTS,
}
