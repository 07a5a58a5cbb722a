"""Running a model once to watch it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.common.undisturbed import Kept, undisturbed
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


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: a dict as keywords, a tuple or list as arguments, anything else as one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def watch(model: nn.Module, batch: Any, forward: Forward) -> Evidence:
    """What one forward pass shows of the parameters, in evaluation mode.

    Where trainable parameters took no part, a second pass in training mode looks for heads and branches that are only
    there in training. Nothing of the model changes. What the model raises passes through.
    """
    flow = Flow(model, AddressSpace({name: p.shape for name, p in model.named_parameters()}))
    with _put_back(model, training=False) as kept, Follow(flow, kept):
        _reached(flow, model, forward(model, batch))
    unseen = [p for n, p in enumerate(model.parameters()) if p.requires_grad and n not in flow.evidence.uses]
    if unseen:
        with _put_back(model, training=True) as kept, Follow(flow, kept):
            try:
                _reached(flow, model, forward(model, batch))
            except Exception as error:  # batch normalisation refuses a batch of one, for example
                logging.getLogger(__name__).debug("no second pass in training mode: %s", error)
    return flow.evidence


@contextmanager
def _put_back(model: nn.Module, training: bool) -> Iterator[Kept]:
    """A pass in evaluation or training mode, without gradients and warnings, of which nothing stays."""
    with undisturbed(model) as kept, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in model.modules():
            module.training = training
            if getattr(module, "max_norm", None) is not None:
                module.__dict__["max_norm"] = None  # such an embedding changes its weight whenever it is read
        yield kept


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
