"""Random probes of the outputs, and the moments of every tensor's gradients under them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.function_space.isolation import gradient_hooks_off
from layerwise.function_space.outputs import Outputs

Distribution = Literal["rademacher", "gaussian"]


def draw_probes(
    outputs: Outputs, count: int, distribution: Distribution, generator: torch.Generator
) -> Iterator[Tensor]:
    """Independent probes with `E eps eps^T = I` on the entries that count, 0 elsewhere, in the outputs'
    shape.

    They are not divided by sqrt(N): half precision would lose them. `log N` is subtracted from the log
    moments.
    """
    like = outputs.values
    for _ in range(count):
        if distribution == "gaussian":
            eps = torch.randn(like.shape, generator=generator, device=like.device).to(like.dtype)
        else:
            eps = random_signs(like, generator)
        yield eps if outputs.mask is None else eps * outputs.mask


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent +1 and -1, in the shape and dtype of `like`: eight from each random byte, as random numbers cost."""
    count = like.numel()
    bytes_ = torch.empty(-(-count // 8), dtype=torch.uint8, device=like.device).random_(generator=generator)
    shifts = torch.arange(8, dtype=torch.uint8, device=like.device)
    bits = (bytes_[:, None] >> shifts & 1).flatten()[:count]
    return bits.to(like.dtype).mul_(2).sub_(1).reshape(like.shape)


def probes_at_once(outputs: Outputs, leaves: Mapping[str, Tensor], memory: int) -> int:
    """How many probes' gradients fit into `memory` bytes, the outputs' gradients on the way included."""
    parameters = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
    return max(1, memory // max(1, parameters + 4 * outputs.values.numel() * outputs.values.element_size()))


def run_probes(
    outputs: Outputs,
    leaves: Mapping[str, Tensor],
    probes: Sequence[Tensor] | Iterator[Tensor],
    add: Callable[[str, Tensor], None],
    memory: int,
    streaming: bool,
) -> None:
    """Differentiate the outputs along each probe and hand every tensor's gradients to `add`.

    Several probes go through one batched backward where `memory` bytes allow it. Otherwise, with `streaming`
    (leaves of our own, whose `.grad` nobody else sees), each gradient is used and freed as soon as it is
    complete, so that never more than the largest tensor's is held.
    """
    if not outputs.values.requires_grad:
        raise LayerwiseError(
            "the outputs do not depend on any trainable parameter: does forward detach them?"
        )
    at_once = probes_at_once(outputs, leaves, memory)
    pending: list[Tensor] = []
    with gradient_hooks_off(leaves):
        for probe in probes:
            pending.append(probe)
            if len(pending) == at_once:
                at_once = _differentiate(outputs.values, leaves, pending, add, at_once, streaming)
                pending = []
        if pending:
            _differentiate(outputs.values, leaves, pending, add, len(pending), streaming)


def _differentiate(
    values: Tensor,
    leaves: Mapping[str, Tensor],
    probes: list[Tensor],
    add: Callable[[str, Tensor], None],
    at_once: int,
    streaming: bool,
) -> int:
    """One batch of probes; returns how many to take next time (1 once an operation proves not to batch)."""
    if len(probes) > 1:
        try:
            grads = _batched_gradients(values, leaves, torch.stack(probes))
        except RuntimeError:
            at_once = 1  # some backward formula has no batching rule: one by one gives the same numbers
        else:
            for name, grad in grads.items():
                add(name, grad)
            return at_once
    for probe in probes:
        if streaming:
            _stream(values, leaves, probe, add)
        else:
            grads_ = torch.autograd.grad(
                values, list(leaves.values()), probe, retain_graph=True, allow_unused=True
            )
            for name, one in zip(leaves, grads_, strict=True):
                if one is not None:
                    add(name, one[None])
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
