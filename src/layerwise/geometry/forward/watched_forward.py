"""Running a model once to watch it, and leaving it as it was."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from layerwise.geometry.forward.addresses import AddressSpace
from layerwise.geometry.forward.evidence import Evidence
from layerwise.geometry.forward.flow import Flow
from layerwise.geometry.forward.follow import Follow
from layerwise.geometry.module_kinds import is_base_model

#: `forward(model, batch)` runs the model; its result is searched for tensors, the outputs.
Forward = Callable[[nn.Module, Any], Any]
#: What transformers calls results that are meant for its own layers.
_INNER = ("hidden_states", "past_key_values", "attentions", "mems")
#: What its base models, which have no task, give to the layers that come after them.
_HIDDEN = (*_INNER, "last_hidden_state", "pooler_output", "cls_token")
_OWN_DICTS = ("_parameters", "_buffers", "_modules")


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: a dict as keywords, a tuple or list as arguments, anything else as one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def watch(
    model: nn.Module, batch: Any, forward: Forward, factors: frozenset[int], linear: frozenset[int]
) -> Evidence:
    """What one forward pass shows of the parameters, in evaluation mode.

    Where trainable parameters took no part, a second pass in training mode looks for heads and branches that are only
    there in training. Nothing of the model changes. What the model raises passes through.
    """
    names = {name: p.shape for name, p in model.named_parameters()}
    flow = Flow(model, AddressSpace(names), factors, linear)
    with undisturbed(model), Follow(flow):
        _reached(flow, model, forward(model, batch))
    unseen = [p for n, p in enumerate(model.parameters()) if p.requires_grad and n not in flow.evidence.uses]
    if unseen:
        with undisturbed(model, training=True), Follow(flow):
            try:
                _reached(flow, model, forward(model, batch))
            except Exception as error:  # batch normalisation refuses a batch of one, for example
                logging.getLogger(__name__).debug("no second pass in training mode: %s", error)
    return flow.evidence


def _reached(flow: Flow, model: nn.Module, outputs: Any) -> None:
    for tensor in output_tensors(outputs, _HIDDEN if is_base_model(model) else _INNER):
        origin = flow.origin(tensor)
        if origin is not None:
            flow.evidence.reached |= origin.results_of


def output_tensors(outputs: Any, inner: Sequence[str]) -> Iterator[Tensor]:
    """The floating-point tensors in what a model returned, without those under the names that are not outputs."""
    waiting, seen = [outputs], set()
    while waiting:
        found = waiting.pop()
        if isinstance(found, Tensor):
            if found.is_floating_point() or found.is_complex():
                yield found
        elif isinstance(found, Mapping):
            waiting += [each for key, each in found.items() if not any(word in str(key) for word in inner)]
        elif isinstance(found, (tuple, list)):
            waiting += found
        elif id(found) not in seen and not isinstance(found, (nn.Module, type)):
            seen.add(id(found))
            waiting.append(_attributes_of(found))


def _attributes_of(found: Any) -> dict[str, Any]:
    """Of a dataclass, a distribution, a namespace."""
    if is_dataclass(found):
        return {field.name: getattr(found, field.name) for field in fields(found)}
    return getattr(found, "__dict__", {})


@contextmanager
def undisturbed(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Run the model in evaluation (or training) mode, compiled parts as they were written, and put everything back.

    Attributes, buffers and modes of all modules, random numbers and settings of torch come back, errors included.
    """
    modules = list(model.modules())
    kept = _attributes(modules)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(_unsafe_preserve_version_counter(tuple(buffer for buffer, _ in buffers)))
        stack.callback(_restore, kept, buffers)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
        stack.enter_context(torch.inference_mode(False))  # which turns gradients on
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_eager())
        torch.backends.mha.set_fastpath_enabled(False)
        for module in modules:
            module.training = training
            if getattr(module, "max_norm", None) is not None:
                module.__dict__["max_norm"] = None  # such an embedding changes its weight whenever it is read
        yield


def _eager() -> Any:
    """Compiled functions run as they were written: compiled code cannot be watched."""
    stance = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance is not None else nullcontext()


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def _attributes(modules: list[nn.Module]) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]:
    return [
        (module, dict(module.__dict__), {key: dict(module.__dict__[key]) for key in _OWN_DICTS})
        for module in modules
    ]


def _restore(
    kept: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]], buffers: list[tuple[Tensor, Tensor]]
) -> None:
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    for module, attributes, own in kept:
        # FSDP2 keeps account of the parameters it puts in and takes out.
        reshard: Any = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()
        for key, values in own.items():
            if key != "_parameters" or reshard is None:
                module.__dict__[key].clear()
                module.__dict__[key].update(values)
        for key in module.__dict__.keys() - attributes.keys():
            del module.__dict__[key]
        module.__dict__.update(attributes)
