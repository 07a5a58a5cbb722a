"""One look at a model: running it once to watch it, with the user's batch, with one made for it, or not at all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from layerwise.common.parameter_names import unwrap
from layerwise.common.running import Kept, always_training, call, undisturbed, written
from layerwise.geometry.forward.addresses import AddressSpace
from layerwise.geometry.forward.evidence import Evidence
from layerwise.geometry.forward.flow import Flow, Operation, name_of, tensors_in
from layerwise.geometry.forward.made_batch import made_batch
from layerwise.geometry.forward.rules import follow, other
from layerwise.geometry.module_kinds import is_base_model

_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, NotImplementedError)


class Follow(TorchDispatchMode):
    """Runs every operation under it as it is, and then tells a flow what it does to the rows of weights.

    `flex_attention` is one operation. What runs other functions as one (`torch.cond`) is refused: nothing sees into it.
    `kept`, which is to be put back after the pass, is told of all that is written.
    """

    supports_higher_order_operators = True

    def __init__(self, flow: Flow, kept: Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flow = flow
        self._kept = kept
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, then say of its results where they come from."""
        kwargs = kwargs or {}
        tensors = tensors_in((*args, *kwargs.values()))
        if isinstance(func, HigherOrderOperator) and "attention" not in func.name():
            raise NotImplementedError(f"{func.name()} runs functions that cannot be followed")
        out = run_operation(func, args, kwargs, tensors, self._kept)
        self._count += 1
        results = tensors_in((out,))
        operation = Operation(func, args, kwargs, tensors, results, self._count)
        try:
            if results and torch._C._current_graph_task_id() < 0:  # not in a backward pass
                follow(self._flow, operation)
        except _FAILURES:  # what is not understood must not break the user's forward pass
            other(self._flow, operation)
        return out


def run_operation(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: list[Tensor], kept: Kept) -> Any:
    """An operation on `tensors` in a pass of which nothing stays; on the meta device where any of them is there."""
    targets = written(func, args, kwargs)
    kept.before_writing(targets)
    if any(tensor.is_meta for tensor in tensors):
        return _run_on_meta(func, args, kwargs, targets)
    return func(*args, **kwargs)


def _run_on_meta(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], targets: list[Tensor]) -> Any:
    """The operation with all its tensors on the meta device; what it writes into stays where it is, as it was."""
    moved, named = tree_map_only(
        Tensor, lambda tensor: tensor if tensor.is_meta else tensor.to("meta"), (args, dict(kwargs))
    )
    if "device" in named:
        named["device"] = torch.device("meta")
    if name_of(func) == "_grouped_mm":  # which on this device is there for bfloat16 alone
        halves = tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, moved)
        return func(*halves, **named).to(args[0].dtype)
    out = func(*moved, **named)
    if not targets or len(targets) != len(func._schema.returns):
        return out
    return targets[0] if len(targets) == 1 else tuple(targets)


#: `forward(model, batch)` runs the model; its result is searched for tensors, the outputs.
Forward = Callable[[nn.Module, Any], Any]
#: What transformers calls results that are meant for its own layers.
_INNER = ("hidden_states", "past_key_values", "attentions", "mems")
#: What its base models, which have no task, give to the layers that come after them.
_HIDDEN = (*_INNER, "last_hidden_state", "pooler_output", "cls_token")


def look(model: nn.Module, batch: Any = None, forward: Forward | None = None) -> tuple[Evidence | None, str | None]:
    """Run the model once on the batch and watch its parameters; arguments as of `param_groups`. Nothing of it changes.

    Without a batch a small one is made for transformers' models where that is safe.

    Returns:
        What was seen, None where the model did not run; and why what was given could not be run, "" if it was, None where
        nothing was given.
    """
    inner = unwrap(model)
    given = batch is not None or forward is not None
    if not given:
        with suppress(Exception):  # a config without the numbers that a batch is made of
            batch = made_batch(inner)
        if batch is None:
            return None, None
    try:
        evidence = watch(inner, batch, forward or call)
    except Exception as error:  # whatever a user's model raises
        first = (str(error).splitlines() or [""])[0][:200]
        raised = f"{type(error).__name__}: {first}"
        told = f"the model did not run on the batch ({raised}): roles are those of the modules, unless forward= runs it"
        return None, told if given else None
    if not given:
        return evidence, None
    evidence.of_unseen = "took no part in the forward pass"
    return evidence, ""


def watch(model: nn.Module, batch: Any, forward: Forward) -> Evidence:
    """What one forward pass shows of the parameters, in evaluation mode.

    Where trainable parameters took no part, a second pass in training mode looks for heads and branches that are only
    there in training. Nothing of the model changes. What the model raises passes through.
    """
    try:
        return _watched(model, batch, forward, torch.no_grad)
    except RuntimeError as error:
        if not needs_gradients(error):
            raise
        evidence = _watched(model, batch, forward, torch.enable_grad)
        if not evidence.reached:
            raise  # derivatives alone come out, and these are not followed
        return evidence


def needs_gradients(error: RuntimeError) -> bool:
    """Whether a model that was run without them differentiates by its inputs, as force fields do."""
    return "does not require grad" in str(error)


def _watched(model: nn.Module, batch: Any, forward: Forward, gradients: type[torch.no_grad | torch.enable_grad]) -> Evidence:
    flow = Flow(model, AddressSpace({name: p.shape for name, p in model.named_parameters()}))
    with one_pass(model, training=False) as kept, gradients(), Follow(flow, kept):
        _reached(flow, model, forward(model, batch))
    unseen = [p for n, p in enumerate(model.parameters()) if p.requires_grad and n not in flow.evidence.uses]
    if unseen:
        with one_pass(model, training=True) as kept, gradients(), Follow(flow, kept):
            try:
                _reached(flow, model, forward(model, batch))
            except Exception as error:  # batch normalisation refuses a batch of one, for example
                logging.getLogger(__name__).debug("no second pass in training mode: %s", error)
    return flow.evidence


@contextmanager
def one_pass(model: nn.Module, training: bool) -> Iterator[Kept]:
    """A pass in evaluation or training mode, without gradients and warnings, of which nothing stays."""
    with undisturbed(model) as kept, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in model.modules():
            module.training = training or always_training(module)
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
            own = {f.name: getattr(found, f.name) for f in fields(found)} if is_dataclass(found) else None
            waiting.append(getattr(found, "__dict__", {}) if own is None else own)  # of a distribution, a namespace
