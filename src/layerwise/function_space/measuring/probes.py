"""Random probes of the outputs, and the moments of every tensor's gradients under them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Literal, Protocol

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.isolation import gradient_hooks_off
from layerwise.function_space.measuring.outputs import Outputs
from layerwise.function_space.measuring.random_rows import random_normals, random_signs

Distribution = Literal["rademacher", "gaussian"]


def draw_probes(
    outputs: Outputs,
    count: int,
    distribution: Distribution,
    seed: int,
    first_probe: int = 0,
    first_row: int = 0,
) -> Iterator[Tensor]:
    """Independent probes with `E eps eps^T = I` on the entries that count, 0 elsewhere, in the outputs'
    shape.

    An entry's number depends on the seed, the probe's number and the entry's place in the global batch, of which the
    outputs' rows are those from `first_row` on: not on how the batch is spread over processes, nor on the device.
    They are not divided by sqrt(N): half precision would lose them. `log N` is subtracted from the log
    moments.
    """
    values = outputs.values.detach()
    draw = random_normals if distribution == "gaussian" else random_signs
    rows = range(first_row, first_row + (values.shape[0] if values.ndim else 1))
    for probe in range(first_probe, first_probe + count):
        eps = draw((seed, probe), rows, values if values.ndim else values[None]).reshape(values.shape)
        yield eps if outputs.mask is None else eps * outputs.mask


def probes_at_once(outputs: Outputs, leaves: Mapping[str, Tensor], memory: int) -> int:
    """How many probes' gradients fit into `memory` bytes, the outputs' gradients on the way included."""
    parameters = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
    return max(1, memory // max(1, parameters + 4 * outputs.values.numel() * outputs.values.element_size()))


class Sink(Protocol):
    """Where the gradients of probes go (`collect.Collector`)."""

    def add(self, name: str, grads: Tensor) -> None:
        """The gradients of one tensor under some probes, `[probes, *shape]`."""

    def done(self, probes: int) -> None:
        """Those of all tensors have come under these many probes; the absent ones are 0."""

    def agree(self, number: int) -> int:
        """The least of a number over the processes that run the same probes: they take as many at once."""


def run_probes(
    outputs: Outputs,
    leaves: Mapping[str, Tensor],
    probes: Sequence[Tensor] | Iterator[Tensor],
    sink: Sink,
    memory: int,
    streaming: bool,
) -> None:
    """Differentiate the outputs along each probe and hand every tensor's gradients to `sink`.

    Several probes go through one batched backward where `memory` bytes allow it. Otherwise, with `streaming`
    (leaves of our own, whose `.grad` nobody else sees), each gradient is used and freed as soon as it is
    complete, so that never more than the largest tensor's is held.
    """
    if not outputs.values.requires_grad:
        raise LayerwiseError(
            "the outputs do not depend on any trainable parameter: does forward detach them?"
        )
    at_once = sink.agree(probes_at_once(outputs, leaves, memory))
    pending: list[Tensor] = []
    with gradient_hooks_off(leaves):
        for probe in probes:
            pending.append(probe)
            if len(pending) == at_once:
                at_once = _differentiate(outputs.values, leaves, pending, sink, at_once, streaming)
                pending = []
        if pending:
            _differentiate(outputs.values, leaves, pending, sink, len(pending), streaming)


def _differentiate(
    values: Tensor,
    leaves: Mapping[str, Tensor],
    probes: list[Tensor],
    sink: Sink,
    at_once: int,
    streaming: bool,
) -> int:
    """One batch of probes; returns how many to take next time (1 once an operation proves not to batch)."""
    if len(probes) > 1:
        batched: dict[str, Tensor] | None = None
        with suppress(RuntimeError):
            batched = _batched_gradients(values, leaves, torch.stack(probes))
        if sink.agree(batched is not None) and batched is not None:
            for name, grad in batched.items():
                sink.add(name, grad)
            sink.done(len(probes))
            return at_once
        at_once = 1  # some backward formula has no batching rule: one by one gives the same numbers
    for probe in probes:
        if streaming:
            _stream(values, leaves, probe, sink.add)
        else:
            grads = torch.autograd.grad(
                values, list(leaves.values()), probe, retain_graph=True, allow_unused=True
            )
            for name, one in zip(leaves, grads, strict=True):
                if one is not None:
                    sink.add(name, one[None])
        sink.done(1)
    return at_once


def _batched_gradients(values: Tensor, leaves: Mapping[str, Tensor], probes: Tensor) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*")
        grads = torch.autograd.grad(
            values, list(leaves.values()), probes, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def _stream(
    values: Tensor, leaves: Mapping[str, Tensor], probe: Tensor, add: Callable[[str, Tensor], None]
) -> None:
    def use(name: str) -> Callable[[Tensor], None]:
        def hook(leaf: Tensor) -> None:
            grad, leaf.grad = leaf.grad, None
            if grad is not None:
                with torch.no_grad():
                    add(name, grad[None])

        return hook

    handles = [leaf.register_post_accumulate_grad_hook(use(name)) for name, leaf in leaves.items()]
    try:
        torch.autograd.backward(values, probe, retain_graph=True, inputs=list(leaves.values()))
    finally:
        for handle in handles:
            handle.remove()
