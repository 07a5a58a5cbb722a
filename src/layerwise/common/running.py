"""Running a model: on a batch, in the one way that roles and function space share, and so that it is left as it was."""

from __future__ import annotations

import inspect
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from layerwise.common.group_by import group_by
from layerwise.common.parameter_names import unwrap
from layerwise.errors import LayerwiseError

#: Where a tensor holds the hooks that are run on its gradient; None where torch has made no place for them yet.
GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_CONTAINERS = (dict, OrderedDict, list, set)


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: a dict as keywords, a tuple or list as arguments, anything else as one argument.

    A dict is the one argument of a `forward` that takes no such keywords, as sentence-transformers' does. Of a tuple as many
    as `forward` takes, so that the `(inputs, targets)` of a DataLoader do for a model of inputs alone.

    Raises:
        LayerwiseError: a DataLoader, in place of what it yields; a model without a forward.
    """
    if isinstance(batch, DataLoader):
        raise LayerwiseError("the batch is a DataLoader: give one of its batches, next(iter(loader))")
    inner = unwrap(model)
    if getattr(inner.forward, "__func__", None) is nn.Module.forward:
        raise LayerwiseError(
            f"{type(inner).__name__} has no forward: give forward=lambda model, inputs: model.method(inputs)"
        )
    if isinstance(batch, Mapping) and not _takes_whole(model, batch):
        return model(**batch)
    if not isinstance(batch, (tuple, list)):
        return model(batch)
    return model(*batch[: _takes(model)])


def call_in_words(model: nn.Module, batch: Any, name: str) -> str:
    """`call` as a line of code, where the batch is called `name`: `model(*inputs)`."""
    if isinstance(batch, Mapping) and not _takes_whole(model, batch):
        return f"model(**{name})"
    if not isinstance(batch, (tuple, list)):
        return f"model({name})"
    takes = _takes(model)
    return f"model(*{name})" if takes is None or takes >= len(batch) else f"model(*{name}[:{takes}])"


def _takes_whole(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether `forward` takes a dict as its one argument, and none of its entries as keywords."""
    try:
        signature = inspect.signature(unwrap(model).forward)
    except ValueError:  # a traced model has none
        return False
    if signature.parameters.keys() & batch.keys():  # with an entry too many, or too few: let the model say which
        return False
    try:
        signature.bind(**batch)
    except TypeError:
        with suppress(TypeError):
            signature.bind(batch)
            return True
    return False


def _takes(model: nn.Module) -> int | None:
    """How many arguments by position; None: any number."""
    takes = inspect.signature(unwrap(model).forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in takes):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in takes)


def call_given(name: str, function: Callable[..., Any], *args: Any, needed: str) -> Any:
    """Call the function that a user gave as the argument `name`.

    Raises:
        LayerwiseError: it cannot take these arguments; with `needed`, which says what they are and how to take them.
    """
    try:
        return function(*args)
    except (TypeError, AttributeError) as error:
        called = getattr(function, "__name__", type(function).__name__)
        raise LayerwiseError(
            f"{name}={called} failed ({type(error).__name__}: {error}): it is called with {needed}"
        ) from error


def always_training(module: nn.Module) -> bool:
    """Whether it is run in training mode always: one of packed weights (bitsandbytes'), which computes the same in either.

    In evaluation mode bitsandbytes packs 4-bit weights anew on some processors, for good, and no gradient passes any more.
    """
    return any(p is not None and p.dtype in (torch.uint8, torch.int8) for p in module._parameters.values())


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[Kept]:
    """Run a model, compiled parts as they were written, and put everything back, errors included.

    Attributes, buffers, modes and hooks of all modules, gradients, random numbers and settings of torch come back, and
    weights into which something was written that the `Kept` was told of before.
    """
    kept = Kept(model)
    with ExitStack() as stack:
        stack.enter_context(_unsafe_preserve_version_counter(kept.counted))
        stack.callback(kept.put_back)
        stack.enter_context(same_random_numbers(model))
        stack.enter_context(torch.inference_mode(False))  # which turns gradients on
        # Compiled functions run as they were written: compiled code cannot be watched, and would be compiled anew.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # torch's own path for attention in evaluation mode can neither be followed nor differentiated.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        yield kept


@contextmanager
def under_autocast(tensors: Iterable[Tensor], dtype: torch.dtype | None) -> Iterator[None]:
    """Compute with these tensors under autocast to `dtype`; with None as they are, inside the caller's autocast too."""
    with ExitStack() as stack:
        for kind in sorted({tensor.device.type for tensor in tensors} | {"cpu"}):
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None))
        yield


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Random numbers drawn inside come from the state before it, which comes back: torch's, numpy's, Python's, and those
    of generators that modules hold.
    """
    modules = list(model.modules())
    held = [each for module in modules for each in module.__dict__.values()]
    generators = [(each, each.get_state()) for each in held if isinstance(each, torch.Generator)]
    tensors = [t for module in modules for t in (*module._parameters.values(), *module._buffers.values())]
    devices = {t.device.index or 0 for t in tensors if t is not None and t.is_cuda}
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for generator, state in generators:
            generator.set_state(state)


class Writes(TorchDispatchMode):
    """Tells a function of tensors, before each operation that writes into some; the model runs as it does without.

    Args:
        before: is told.
    """

    supports_higher_order_operators = True

    def __init__(self, before: Callable[[list[Tensor]], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation."""
        kwargs = kwargs or {}
        targets = written(func, args, kwargs)
        if targets:
            self._before(targets)
        return func(*args, **kwargs)


def written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes into: its first argument in place, those for `out`."""
    places = _written_arguments(func)
    if not places:
        return []
    if func is torch.ops.aten.set_.source_Tensor and args[0].is_set_to(args[1]):
        return []  # a parametrization that is registered or removed sets its weight to what it is
    targets = [args[at] if at < len(args) else kwargs.get(name) for at, name in places]
    several = [target if isinstance(target, (tuple, list)) else (target,) for target in targets]
    return [tensor for tensors in several for tensor in tensors if isinstance(tensor, Tensor)]


@cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    """Place and name of each argument that an operation writes into."""
    schema = getattr(func, "_schema", None)
    arguments = [] if schema is None or not schema.is_mutable else schema.arguments
    return [(at, argument.name) for at, argument in enumerate(arguments) if argument.is_write]


def storage(tensor: Tensor) -> int | None:
    """What tensors have in common that share their memory; None of those that have none of their own."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided and not tensor.is_meta else None


class Kept:
    """What running a model may change of it.

    Weights and gradients are copied when something first writes into them, which is rare.

    Args:
        model: the model.

    Attributes:
        modules: the model's.
        tensors: its parameters and buffers.
        counted: the tensors whose version counters are to stay as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        parameters, buffers = list(model.parameters()), list(model.buffers())
        self.tensors = (*parameters, *buffers)
        self._modules = [KeptModule(module) for module in self.modules]
        self._parameters = []
        for p in parameters:
            hooks = {name: dict(getattr(p, name) or {}) for name in GRADIENT_HOOKS}
            data = p.data if type(p) is nn.Parameter else None
            self._parameters.append(KeptParameter(p, data, p.grad, p.requires_grad, hooks))
        self._values = [(buffer, buffer.clone()) for buffer in buffers if not buffer.is_meta]
        plain = [each for each in self._parameters if each.data is not None]
        gradients = [each.grad for each in plain if each.grad is not None]
        self._not_copied = (*(each.data for each in plain if each.data is not None), *gradients)
        counted = (*(buffer for buffer, _ in self._values), *(each.parameter for each in plain), *gradients)
        self.counted = tuple(t for t in counted if not t.is_inference() and t.layout is torch.strided)

    @cached_property
    def _stored(self) -> dict[int | None, list[Tensor]]:
        """Weights and gradients by their memory, those into which nothing was written yet."""
        return group_by((each for each in self._not_copied if storage(each) is not None), storage)

    def before_writing(self, tensors: Iterable[Tensor]) -> None:
        """Copy those weights and gradients that are about to be written to, in whole or in part."""
        for tensor in tensors:
            for each in self._stored.pop(storage(tensor), []):
                self._values.append((each, each.detach().clone()))

    @torch.no_grad()
    def put_back(self) -> None:
        """Everything as it was."""
        for kept in self._parameters:
            p = kept.parameter
            if kept.data is not None and storage(p) != storage(kept.data):
                p.data = kept.data
            if p.grad is not kept.grad:
                p.grad = kept.grad
            p.requires_grad_(kept.requires_grad)
            for name, before in kept.hooks.items():
                held = getattr(p, name)
                if held is not None and held != before:
                    held.clear()
                    held.update(before)
        for tensor, value in self._values:
            tensor.copy_(value)
        for module in self._modules:
            module.put_back()


@dataclass(frozen=True)
class KeptParameter:
    """A parameter, the tensors that it held, and its gradient's hooks.

    Attributes:
        data: None of a parameter of another class (quantised, sharded), which keeps its own.
    """

    parameter: nn.Parameter
    data: Tensor | None
    grad: Tensor | None
    requires_grad: bool
    hooks: dict[str, dict[int, Any]]


class KeptModule:
    """A module, its attributes, and what was in those that hold others: parameters, hooks, a list of the module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(module.__dict__)
        self.contents = {key: held.copy() for key, held in self.attributes.items() if type(held) in _CONTAINERS}

    def put_back(self) -> None:
        """Everything as it was."""
        # FSDP2 keeps account of the parameters it puts in and takes out.
        reshard: Any = getattr(self.module, "reshard", None)
        if reshard is not None:
            reshard()
        for key, contents in self.contents.items():
            held = self.attributes[key]
            if (contents or held) and (key != "_parameters" or reshard is None):  # most are empty
                held.clear()
                if isinstance(held, list):
                    held.extend(contents)
                else:
                    held.update(contents)
        for key in self.module.__dict__.keys() - self.attributes.keys():
            del self.module.__dict__[key]
        self.module.__dict__.update(self.attributes)
