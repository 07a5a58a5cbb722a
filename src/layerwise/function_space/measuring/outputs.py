"""Which numbers are "the outputs": picking a tensor, the entries of it that count, and random probes of these.

An entry of a probe depends on a seed, the probe's number and the entry's place in the global batch, and on nothing else. A
generator's stream would have to be drawn from its beginning by every process, and differs between devices. Here the 64
bits at place j of row i are SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014) at a counter, so that any
rows of the global batch can be drawn anywhere. Integer arithmetic wraps around, as the function is defined to.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.common.running import call, call_in_words
from layerwise.errors import LayerwiseError

#: `forward(model, inputs)` returns the outputs, or `(outputs, mask)`.
Forward = Callable[[nn.Module, Any], Any]

_WEYL = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


@dataclass(frozen=True)
class Outputs:
    """The model's outputs, `[batch, ..., classes]`, or of slices that were run side by side `[slices, examples, ...]`.

    Attributes:
        values: the numbers.
        mask: which of them count, in their shape (`None`: all).
        rows: size of the first dimension, the batch (1 of a scalar), or 0 of outputs that stand in for none.
        leaves: what stood for the parameters in their graph; of slices side by side, one of each for every slice.
        slices: how many were run side by side (1: the batch as it is).
    """

    values: Tensor
    mask: Tensor | None
    rows: int
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    slices: int = 1

    def probes_at_once(self, memory: int, examples: float = 1) -> int:
        """How many probes' gradients fit into `memory` bytes, 0 too, the outputs' gradients on the way included.

        `examples`: of how many times as many examples.
        """
        parameters = sum(leaf.nbytes for leaf in self.leaves.values())
        return int(memory / max(1, parameters + 4 * self.values.nbytes * examples))


def nodes_of(outputs: Tensor) -> Iterator[Any]:
    """All nodes of a tensor's graph, each once."""
    waiting: list[Any] = [] if outputs.grad_fn is None else [outputs.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def nothing_counts(masked: bool) -> LayerwiseError:
    """The error where no entry of the global batch counts."""
    if not masked:
        return LayerwiseError("the outputs are empty: there is nothing to measure on")
    return LayerwiseError("the mask leaves no output entry: pass inputs with at least one position that counts")


def model_output(model: nn.Module, inputs: Any) -> Any:
    """The default: `call` the model; a tensor, its `.logits`, or the first of a tuple whose others are no outputs.

    The `attention_mask` of a dict leaves padding out of the count.
    """
    result = call(model, inputs)
    values = _tensor_of(result)
    if values is None:
        raise LayerwiseError(
            f"the model returned {_in_words(result)}, and it is not sure what of it are the outputs: pass "
            f"forward=lambda model, inputs: {call_in_words(model, inputs, 'inputs')}{_first_part(result)}, or another part"
        )
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return (values, mask) if _is_mask(mask, values) else values


def log_softmax(model: nn.Module, inputs: Any) -> Any:
    """`model_output` through a log-softmax over the last dimension: the paper's output space for transformers."""
    result = model_output(model, inputs)
    if isinstance(result, tuple):
        return torch.log_softmax(result[0].float(), dim=-1), result[1]
    return torch.log_softmax(result.float(), dim=-1)


NAMED: dict[str, Forward] = {"output": model_output, "log_softmax": log_softmax}


def resolve(forward: Forward | str | None) -> Forward:
    """`None` is the model's output; a string is a key of `NAMED`; anything else is called with the model and inputs."""
    if forward is None:
        return model_output
    if isinstance(forward, str):
        if forward not in NAMED:
            raise LayerwiseError(f"forward is {forward!r}: use a function or one of {', '.join(NAMED)}")
        return NAMED[forward]
    try:
        inspect.signature(forward).bind(None, None)
    except TypeError as error:
        raise LayerwiseError(
            f"forward={forward!r:.80} ({error}): it is called with the model and the inputs, as lambda model, inputs: ..."
        ) from None
    except ValueError:  # a function that does not say what it takes
        pass
    return forward


def space_name(forward: Forward) -> str:
    """The name under which an output space is compared between a base model and a large one.

    A function's own, wherever it was defined. Lambdas have none, and get a hash of their code.
    """
    for name, known in NAMED.items():
        if forward is known:
            return name
    inner = forward
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = str(getattr(inner, "__qualname__", type(inner).__qualname__)).rsplit("<locals>.", 1)[-1]
    if "<lambda>" not in name and inner is forward:
        return name
    said = repr(_identity(forward)).encode()
    return f"{name.strip('<>')}-{hashlib.sha256(said).hexdigest()[:12]}"


def _identity(value: Any) -> Any:
    """What a function does, as far as its code and its constants say; other values by their text."""
    if isinstance(value, functools.partial):
        return _identity(value.func), [_identity(v) for v in value.args], sorted(value.keywords.items(), key=str)
    code = getattr(value, "__code__", value)
    if isinstance(code, CodeType):
        return code.co_code, code.co_names, [_identity(constant) for constant in code.co_consts]
    return repr(value)


def as_outputs(result: Any, mask: Tensor | None = None) -> Outputs:
    """Check what a forward returned; `mask` is over the outputs' first dimensions, and nonzero entries count."""
    if mask is None and isinstance(result, tuple) and len(result) == 2 and _is_mask(result[1], result[0]):
        result, mask = result
    values = _tensor_of(result)
    if values is None:
        raise LayerwiseError(f"forward returned {_in_words(result)}: return the output tensor, or (outputs, mask)")
    if not values.is_floating_point():
        raise LayerwiseError(f"the outputs are {values.dtype}: pass forward= that picks real floating-point outputs")
    rows = values.shape[0] if values.ndim else 1
    if mask is None:
        return Outputs(values, None, rows)
    if mask.shape != values.shape[: mask.ndim]:
        raise LayerwiseError(
            f"the mask has shape {tuple(mask.shape)}, the outputs {tuple(values.shape)}: the mask's shape must be the "
            "beginning of the outputs' shape"
        )
    counted = (mask != 0).to(values.device)
    below = [1] * (values.ndim - mask.ndim)
    return Outputs(values, counted.reshape(*mask.shape, *below).expand(values.shape), rows)


def _is_mask(mask: Any, values: Any) -> bool:
    both = isinstance(mask, Tensor) and isinstance(values, Tensor)
    return both and mask.ndim > 0 and mask.shape == values.shape[: mask.ndim]  # a loss has no dimension


def _tensor_of(result: Any) -> Tensor | None:
    """The outputs in what a model returned, where that is sure.

    A tuple's first tensor is where nothing else in it could be: nanoGPT's `(logits, loss)` and `(logits, None)`, but no
    `(loss, logits)` and no `(outputs, hidden)`.
    """
    if isinstance(result, Tensor):
        return result
    logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    if logits is None and isinstance(result, (tuple, list)) and result:
        first, *others = result
        alone = all(each is None or isinstance(each, (int, float)) or getattr(each, "ndim", 1) == 0 for each in others)
        logits = first if alone and isinstance(first, Tensor) and first.is_floating_point() and first.ndim else None
    return logits if isinstance(logits, Tensor) else None


def _in_words(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"Tensor{list(result.shape)}"
    if isinstance(result, Mapping):
        return f"{type(result).__name__} with {', '.join(map(repr, result))}"
    if isinstance(result, (tuple, list)):
        return f"({', '.join(map(_in_words, result))})"
    return "None" if result is None else type(result).__name__


def _first_part(result: Any) -> str:
    """Code that picks the first tensor that may be the outputs."""
    parts = result.items() if isinstance(result, Mapping) else enumerate(result) if isinstance(result, (tuple, list)) else ()
    tensors = (key for key, each in parts if isinstance(each, Tensor) and each.is_floating_point() and each.ndim)
    found = next((f"[{key!r}]" for key in tensors), "")
    if not found and isinstance(result, (tuple, list)) and result and isinstance(result[0], (Mapping, tuple, list)):
        return f"[0]{_first_part(result[0])}"
    return found or ".NAME"


def draw_probes(outputs: Outputs, count: int, seed: int, first_probe: int = 0, first_row: int = 0) -> Iterator[Tensor]:
    """Independent probes, random signs on the entries that count, 0 elsewhere, in the outputs' shape.

    The outputs' rows are those of the global batch from `first_row` on. Each slice that was run side by side has `count`
    probes of its own, numbered slice by slice. Probes are not divided by sqrt(N): half precision would lose them. `log N`
    is subtracted from the log moments.
    """
    values, slices = outputs.values.detach(), outputs.slices
    like = values[0] if slices > 1 else values if values.ndim else values[None]
    of_seed = _mixed(torch.tensor((seed + 2**63) % 2**64 - 2**63, device="cpu"))  # the int64 of the same 64 bits
    probes = torch.arange(first_probe, first_probe + slices * count, device="cpu")
    states = _mixed(of_seed + _WEYL + probes) + _WEYL
    width, device = math.prod(like.shape[1:]), like.device
    rows = torch.arange(first_row, first_row + len(like), dtype=torch.int64, device=device) * _WEYL
    places = torch.arange(1, 1 - (-width // 64), dtype=torch.int64, device=device) * _WEYL
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    of_byte = (2 * bits - 1).to(like.dtype)  # looked up, a byte at a time: there are many more entries than these
    for number in range(count):
        starts = _mixed(states[number::count].to(device)[:, None] + rows)
        words = _mixed(starts[..., None] + places)  # [slices, rows, places], of 64 bits each
        signs = torch.nn.functional.embedding(words.view(torch.uint8).int(), of_byte).flatten(2)[..., :width]
        eps = signs.reshape(values.shape)
        yield eps if outputs.mask is None else eps * outputs.mask


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's function of each number."""
    # int64 shifts copy the sign bit, so the masks make them logical ones.
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * _FIRST
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * _SECOND
    return z ^ (z >> 31 & 0x1FFFFFFFF)
