"""Random probes of the outputs, and the gradients of every tensor under them.

An entry of a probe depends on a seed, the probe's number and the entry's place in the global batch, and on nothing else. A
generator's stream would have to be drawn from its beginning by every process, and differs between devices. Here the 64
bits at place j of row i are SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014) at a counter, so that any
rows of the global batch can be drawn anywhere. Integer arithmetic wraps around, as the function is defined to.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from layerwise.common.tensors import wide_dtype
from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.outputs import Outputs
from layerwise.function_space.measuring.process_group import Collector

Distribution = Literal["rademacher", "gaussian"]
#: What is said where no parameter that is measured reaches the outputs.
NO_GRAPH = "the outputs do not depend on any trainable parameter: does forward detach them?"

_WEYL = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def draw_probes(
    outputs: Outputs,
    count: int,
    distribution: Distribution,
    seed: int,
    first_probe: int = 0,
    first_row: int = 0,
    slices: int = 1,
) -> Iterator[Tensor]:
    """Independent probes with `E eps eps^T = I` on the entries that count, 0 elsewhere, in the outputs' shape.

    The outputs' rows are those of the global batch from `first_row` on. Each slice that was run side by side has `count`
    probes of its own, numbered slice by slice. Probes are not divided by sqrt(N): half precision would lose them. `log N`
    is subtracted from the log moments.
    """
    draw = random_normals if distribution == "gaussian" else random_signs
    parts = outputs.values.detach() if slices > 1 else outputs.values.detach()[None]
    like = parts[0] if parts.ndim > 1 else parts
    rows = range(first_row, first_row + len(like))
    for probe in range(first_probe, first_probe + count):
        eps = torch.stack([draw((seed, probe + k * count), rows, like) for k in range(slices)]).reshape(outputs.values.shape)
        yield eps if outputs.mask is None else eps * outputs.mask


def probes_at_once(outputs: Outputs, leaves: Mapping[str, Tensor], memory: int) -> int:
    """How many probes' gradients fit into `memory` bytes, the outputs' gradients on the way included."""
    parameters = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
    return max(1, memory // max(1, parameters + 4 * outputs.values.numel() * outputs.values.element_size()))


def run_probes(
    outputs: Outputs, leaves: Mapping[str, Tensor], probes: Iterator[Tensor], sink: Collector, at_once: int
) -> None:
    """Differentiate the outputs along each probe and hand every tensor's gradients to `sink`.

    Several probes go through one batched backward where they may. Otherwise each gradient is used and freed as soon as it
    is complete, so that never more than the largest tensor's is held.

    Args:
        outputs: with their graph.
        leaves: tensors of our own, whose `.grad` nobody else sees.
        probes: in the outputs' shape.
        sink: takes the gradients.
        at_once: how many probes there is room for, see `probes_at_once`.
    """
    if not outputs.values.requires_grad:
        raise LayerwiseError(NO_GRAPH)
    at_once = sink.processes.least(at_once)
    while several := list(islice(probes, at_once)):
        if len(several) == 1 or not _batched(outputs.values, leaves, several, sink):
            at_once = 1  # some backward formula has no batching rule: one by one gives the same numbers
            for probe in several:
                _stream(outputs.values, leaves, probe, sink)
                sink.done(1)
        several.clear()  # before the next are drawn


def _batched(values: Tensor, leaves: Mapping[str, Tensor], probes: list[Tensor], sink: Collector) -> bool:
    """All these probes in one backward; returns whether every process could."""
    grads = None
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.filterwarnings("ignore", message=".*performance drop.*")
        along, tensors = torch.stack(probes), list(leaves.values())
        grads = torch.autograd.grad(values, tensors, along, retain_graph=True, allow_unused=True, is_grads_batched=True)
    if not sink.processes.least(int(grads is not None)) or grads is None:
        return False
    for name, grad in zip(leaves, grads, strict=True):
        if grad is not None:
            sink.add(name, grad)
    sink.done(len(probes))
    return True


def _stream(values: Tensor, leaves: Mapping[str, Tensor], probe: Tensor, sink: Collector) -> None:
    """One probe: each gradient is handed over when it is complete."""
    handles = [leaf.register_post_accumulate_grad_hook(partial(_hand_over, sink, name)) for name, leaf in leaves.items()]
    try:
        torch.autograd.backward(values, probe, retain_graph=True, inputs=list(leaves.values()))
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _hand_over(sink: Collector, name: str, leaf: Tensor) -> None:
    grad, leaf.grad = leaf.grad, None
    if grad is not None:
        sink.add(name, grad[None])  # slices side by side have a dimension of their own as well


def random_words(key: tuple[int, ...], rows: range, width: int, device: torch.device) -> Tensor:
    """`[rows, width]` independent 64-bit words (int64), given by `key`, the number of the row and the place in it."""
    state = 0
    for part in key:
        # As `_mixed`, whose operations on one number would take as long as all the rest of a small batch.
        z = (state + part) % 2**64
        z = (z ^ (z >> 30)) * _FIRST % 2**64
        z = (z ^ (z >> 27)) * _SECOND % 2**64
        state = ((z ^ (z >> 31)) + _WEYL + 2**63) % 2**64 - 2**63  # the int64 of the same 64 bits
    numbers = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=device)
    starts = _mixed(state + numbers * _WEYL)
    return _mixed(starts[:, None] + torch.arange(1, width + 1, dtype=torch.int64, device=device) * _WEYL)


def random_signs(key: tuple[int, ...], rows: range, like: Tensor) -> Tensor:
    """Independent +1 and -1 in the shape and dtype of `like`, whose first dimension are these rows: one from each bit."""
    width = math.prod(like.shape[1:])
    bytes_ = random_words(key, rows, -(-width // 64), like.device).view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=like.device)
    bits = (bytes_[:, :, None] >> shifts & 1).flatten(1)[:, :width]
    return bits.to(like.dtype).mul_(2).sub_(1).reshape(like.shape)


def random_normals(key: tuple[int, ...], rows: range, like: Tensor) -> Tensor:
    """Independent standard normal numbers in the shape and dtype of `like`: two from each word (Box and Muller)."""
    width = math.prod(like.shape[1:])
    words = random_words(key, rows, -(-width // 2), like.device)
    wide = wide_dtype(like.device)
    radius = ((words >> 32 & 0xFFFFFFFF).to(wide) + 0.5).div_(2**32).log_().mul_(-2).sqrt_()
    angle = (words & 0xFFFFFFFF).to(wide).mul_(2 * math.pi / 2**32)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.flatten(1)[:, :width].to(like.dtype).reshape(like.shape)


def _mixed(z: Tensor) -> Tensor:
    # int64 shifts copy the sign bit, so the masks make them logical ones.
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * _FIRST
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * _SECOND
    return z ^ (z >> 31 & 0x1FFFFFFFF)
