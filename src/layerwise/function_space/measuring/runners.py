"""Running a model at weights of our choice, as it is measured, and the gradients of every tensor under probes."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from layerwise.common.running import KeptModule, Writes, always_training, storage, under_autocast, undisturbed
from layerwise.common.tensors import is_sharded
from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.exact import Adjoint, Change, adjoint, exact_change
from layerwise.function_space.measuring.linear_products import ProductMoments, Products, only_products
from layerwise.function_space.measuring.moments import ESTIMATORS, Moments, TensorUpdate
from layerwise.function_space.measuring.outputs import Outputs, as_outputs
from layerwise.function_space.measuring.process_group import ALONE, Collector, Processes, SharedCollector

if TYPE_CHECKING:
    from layerwise.function_space.measuring.measurement import Measurement

BatchNormMode = Literal["running", "batch"]
#: What is said of a forward that changes a parameter, as some do to normalise or to clip it.
WRITES = (
    "the forward writes parameter {!r}, and measuring may not: pass forward= that does not, or run the model once before "
    "if it initialises itself from its first batch"
)
#: What is said where no parameter that is measured reaches the outputs.
NO_GRAPH = "the outputs do not depend on any trainable parameter: does forward detach them?"
#: An attribute of a model while it is measured, for hooks that are about training alone.
MEASURED = "_layerwise_measured"
_RUNNING_STATISTICS = nn.modules.batchnorm._NormBase


class Runner(nn.Module):
    """Runs and differentiates a model on leaves of our own in the place of its parameters: they share the weights' memory,
    not their `.grad` and hooks. Frozen parameters stay as they are.

    A module around the user's, so that `torch.func.functional_call` can replace its tensors; that changes nothing in it.

    Args:
        settings: how to measure.
        model: without its wrappers, inside of `in_evaluation_mode`.
        updates: by parameter name; the model is run at the weights before them.
        processes: those that measure together. On one of them weights used in one product alone are measured from its
            factors: those of `full_cov` always; the others where there is no room for whole gradients of several probes,
            which are quicker to square.

    Attributes:
        collector: what takes the gradients of probes.
        seed: of the probes.
        classes: size of the outputs' last dimension, once outputs were counted.
        dtype: theirs.
        entries: how many of them counted so far, over all processes.
    """

    def __init__(
        self, settings: Measurement, model: nn.Module, updates: Mapping[str, TensorUpdate], processes: Processes = ALONE
    ) -> None:
        super().__init__()
        self.settings, self.model, self.updates, self.processes = settings, model, updates, processes
        self.seed, self.classes, self.dtype, self.entries = settings.seed, 1, "", 0
        together = processes.count > 1 or any(is_sharded(update.new) for update in updates.values())
        self.collector = SharedCollector if together else Collector
        #: What a forward may leave behind (hidden states, caches): the next one starts without it.
        self.kept = [KeptModule(module) for module in model.modules()]
        self.own, self.own_buffers = dict(model.named_parameters()), dict(model.named_buffers())
        #: Of each name that a tied tensor has beside its first: that one. `functional_call` would look in each forward.
        every = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        first: dict[int, str] = {}
        self.tied = {name: known for name, t in every if (known := first.setdefault(id(t), name)) != name}
        #: Parameters that the forward writes whenever it reads them, embeddings with `max_norm`: it gets copies of them.
        renormalised = {id(m.weight) for m in model.modules() if getattr(m, "max_norm", None) is not None}
        self.written = {name for name, p in self.own.items() if id(p) in renormalised}
        others = {n: p for n, p in self.own.items() if n not in updates and (p.requires_grad or n in self.written)}
        self.others = {name: p.detach() for name, p in others.items()}
        self.points = {n: (self.own[n] if u.old is None else u.old).detach() for n, u in updates.items()}
        held = (*self.own.items(), *self.points.items())
        #: Whether a forward was watched for what it writes, which makes each operation take longer.
        self.seen = False
        # Whose memory is the model's own.
        self._protected = {storage(tensor): name for name, tensor in held if storage(tensor) is not None}

    def forward(self, inputs: Any) -> Any:
        try:
            return self.settings.function(self.model, inputs)
        finally:
            for module in self.kept:
                module.put_back()

    def outputs(self, batch: Any, mask: Tensor | None) -> Outputs:
        """The outputs on a batch, with their graph."""
        leaves = {name: point.detach().requires_grad_() for name, point in self.points.items()}
        with Products(leaves) if self.processes.count == 1 and torch.is_grad_enabled() else nullcontext():
            return replace(self.outputs_at(leaves, batch, mask), leaves=leaves)

    def outputs_at(self, measured: Mapping[str, Tensor], batch: Any, mask: Tensor | None) -> Outputs:
        """The outputs with these tensors in the place of parameters, and copies of the buffers."""
        tensors = {name: b.clone() for name, b in self.own_buffers.items()}
        for name, tensor in {**self.others, **self.points, **measured}.items():
            tensors[name] = tensor.clone() if name in self.written else tensor
            tensors[name].__dict__.update(self.own[name].__dict__)  # attributes that users put on their parameters
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        named |= {f"model.{name}": tensors[first] for name, first in self.tied.items() if first in tensors}
        before = {} if self.seen else {name: storage(tensor) for name, tensor in tensors.items()}
        with nullcontext() if self.seen else Writes(self._refuse):
            found = torch.func.functional_call(self, named, (batch,), tie_weights=False)
        for name, place in before.items():
            if storage(tensors[name]) != place:  # `.data` was set
                raise LayerwiseError(WRITES.format(name))
        self.seen = True
        return as_outputs(found, mask)

    def _refuse(self, written: list[Tensor]) -> None:
        """Told before something is written."""
        for tensor in written:
            name = self._protected.get(storage(tensor))
            if name is not None:
                raise LayerwiseError(WRITES.format(name))

    def count(self, outputs: Outputs) -> tuple[int, list[int]]:
        """How many rows of the global batch are before these outputs, and how many entries of each slice count in all.

        Notes what the outputs are like.
        """
        values, slices = outputs.values, outputs.slices
        self.classes = values.shape[-1] if values.ndim else 1
        self.dtype = str(values.dtype).removeprefix("torch.")
        entries = [values.numel() // slices] * slices
        if outputs.mask is not None:
            entries = [int(mask.sum()) for mask in (outputs.mask if slices > 1 else [outputs.mask])]
        rows, *counts = zip(*self.processes.gather([outputs.rows, *entries]), strict=True)
        entries = [sum(count) for count in counts]
        self.entries += sum(entries)
        return sum(rows[: self.processes.rank]), entries

    def side_by_side(self, batches: Any, masks: Tensor | None) -> Outputs | None:
        """The outputs of slices in one graph, `[slices, examples, ...]` as they come in; None: they cannot be had so.

        Anything may be raised by a model that cannot be run so.
        """
        # Biases with a dimension of slices escape autocast.
        autocast = any(torch.is_autocast_enabled(p.device.type) for p in self.points.values())
        if self.collector is SharedCollector or self.written or autocast:
            return None
        parts, tree = tree_flatten((batches, masks))
        dims = [0 if isinstance(part, Tensor) else None for part in parts]
        count = next(len(part) for part in parts if isinstance(part, Tensor))
        leaves = {n: p.expand(count, *p.shape).detach().requires_grad_() for n, p in self.points.items()}

        def of_slice(leaves: Mapping[str, Tensor], parts: list[Any]) -> tuple[Tensor, ...]:
            batch, mask = tree_unflatten(parts, tree)
            with Products(leaves, count):
                found = self.outputs_at(leaves, batch, mask)
            return (found.values,) if found.mask is None else (found.values, found.mask)

        values, *mask = torch.func.vmap(of_slice, in_dims=(0, dims))(leaves, parts)
        return Outputs(values, mask[0] if mask else None, values.shape[1], leaves, count)

    def probe(self, outputs: Outputs, probes: Iterator[Tensor]) -> Mapping[str, Moments]:
        """Moments of every measured tensor under each probe.

        Several probes go through one batched backward where they may, as many as there is room for. Where there is none
        each gradient is used and freed as soon as it is complete, so that never more than the largest tensor's is held.
        """
        if not outputs.values.requires_grad:
            raise LayerwiseError(NO_GRAPH)
        collector = self.collector(self.updates, ESTIMATORS[self.settings.method], self.processes)
        at_once = outputs.probes_at_once(self.settings.memory)
        leaves = dict(outputs.leaves)
        for name, product in only_products(outputs.values, outputs.leaves).items():
            of = collector.moments[name]
            if of.estimator.total or (at_once <= 1 and outputs.slices == 1):
                product.moments = ProductMoments(of.estimator, of.update, by_output=product.by_output)
                collector.moments[name] = product.moments
                leaves[name] = product.moments_input
        at_once = self.processes.least(at_once)
        while several := list(islice(probes, max(1, at_once))):
            if not at_once or not _batched_backward(outputs.values, leaves, several, collector):
                at_once = 0  # some backward formula has no batching rule: one by one gives the same numbers
                for probe in several:
                    _streamed_backward(outputs.values, leaves, probe, collector)
                    collector.done(1)
            several.clear()  # before the next are drawn
        return collector.moments

    def adjoint(self, batch: Any, mask: Tensor | None) -> Adjoint | None:
        """What to hold derivatives along any updates against, where it takes that."""
        return adjoint(partial(self.outputs_at, batch=batch, mask=mask), self.points, self.updates)

    def derivative(
        self, batch: Any, mask: Tensor | None, updates: Mapping[str, TensorUpdate], check: Adjoint | None
    ) -> Change:
        """The exact derivative of the outputs along these updates, one that agrees with `check`."""
        return exact_change(partial(self.outputs_at, batch=batch, mask=mask), self.points, updates, check)

    def changed(self, batch: Any, mask: Tensor | None, updates: Mapping[str, TensorUpdate]) -> Outputs:
        """The outputs with these updates applied, and without a graph."""
        # Not under `no_grad`, as a forward may differentiate by its inputs.
        found = self.outputs_at({name: u.applied(self.points[name]) for name, u in updates.items()}, batch, mask)
        return replace(found, values=found.values.detach())


def _batched_backward(values: Tensor, leaves: Mapping[str, Tensor], probes: list[Tensor], collector: Collector) -> bool:
    """All these probes in one backward; returns whether every process could."""
    grads, batched = None, len(probes) > 1
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.filterwarnings("ignore", message=".*performance drop.*")
        grads = torch.autograd.grad(
            values,
            list(leaves.values()),
            torch.stack(probes) if batched else probes[0],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
    if not collector.processes.least(int(grads is not None)) or grads is None:
        return False
    for name, grad in zip(leaves, grads, strict=True):
        if grad is not None:
            collector.add(name, grad if batched else grad[None])
    collector.done(len(probes))
    return True


def _streamed_backward(values: Tensor, leaves: Mapping[str, Tensor], probe: Tensor, collector: Collector) -> None:
    """One probe: each gradient is handed over when it is complete."""

    @torch.no_grad()
    def hand_over(name: str, leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        if grad is not None:
            collector.add(name, grad[None])  # slices side by side have a dimension of their own as well

    handles = [leaf.register_post_accumulate_grad_hook(partial(hand_over, name)) for name, leaf in leaves.items()]
    try:
        torch.autograd.backward(values, probe, retain_graph=True, inputs=list(leaves.values()))
    finally:
        for handle in handles:
            handle.remove()


def check_numbers(parameters: Mapping[str, Tensor]) -> None:
    """Raises LayerwiseError for parameters that nothing can be measured of."""
    for name, p in parameters.items():
        if p.is_meta:
            raise LayerwiseError(
                f"parameter {name!r} is on the meta device and has no numbers: materialise the model "
                "(model.to_empty(device=...), then its weights) before measuring"
            )
        if p.is_complex():
            raise LayerwiseError(f"parameter {name!r} is complex ({p.dtype}): train its view_as_real, or freeze it")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; a tied one once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def in_evaluation_mode(
    model: nn.Module, batch_norm: BatchNormMode = "running", autocast: torch.dtype | None = None
) -> Iterator[None]:
    """Evaluation mode without autocast (or under the given dtype), everything restored at the end, errors included.

    Modules are put into evaluation mode one by one, not by `model.eval()`, which a model may have overridden.
    `batch_norm="batch"` keeps BatchNorm on the batch's statistics. Recurrent layers without dropout keep their mode: it
    changes nothing in them, but cuDNN differentiates them in training mode only. An embedding's gradient holds its padding
    row, whose update counts like any. Wrappers that checkpoint activations do not: they would run the forward again at the
    weights of that time, the model's own.
    """
    with undisturbed(model) as kept, torch.enable_grad(), under_autocast(kept.tensors, autocast):
        model.__dict__[MEASURED] = True  # goes as it came, with all that is set here
        for module in kept.modules:
            if isinstance(module, _RUNNING_STATISTICS):
                module.training = batch_norm == "batch"
            elif not (isinstance(module, nn.RNNBase) and not module.dropout):
                module.training = always_training(module)
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = False  # gradients of which there are no moments
            if isinstance(module, nn.Embedding):
                module.padding_idx = None
            if hasattr(module, "_checkpoint_wrapped_module"):
                module.__dict__["checkpoint_fn"] = operator.call
        yield
