"""The one name of a parameter, and what is inside the wrappers around a model or an optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from layerwise.errors import LayerwiseError

#: Steps of a dotted name that wrappers put in: `torch.compile`, Lightning's Fabric, activation checkpointing, FSDP1.
_WRAPPERS = frozenset({"_orig_mod", "_forward_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def canonical_name(name: str) -> str:
    """A parameter's name without the steps that wrappers add inside or around a model.

    `module.` of DistributedDataParallel is an attribute's ordinary name too; `canonical_names` takes it off where all
    names of a model begin with it.

    Examples:
        >>> canonical_name("_orig_mod.blocks.0._checkpoint_wrapped_module.mlp.weight")
        'blocks.0.mlp.weight'
    """
    return ".".join(step for step in name.split(".") if step not in _WRAPPERS)


def name_to_compare(name: str) -> str:
    """What the names of one parameter have in common whatever was wrapped: without the steps `module`, too.

    Example:
        >>> name_to_compare("module.encoder.module._orig_mod.weight")
        'encoder.weight'
    """
    return ".".join(step for step in canonical_name(name).split(".") if step != "module")


def counterparts(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Name -> the one of `others` that is of the same parameter, for the names that have one.

    The same name, or else the one that differs by what wrappers add, where that is one name on either side.

    Example:
        >>> counterparts(["up.weight", "down.weight"], ["module.up.weight"])
        {'up.weight': 'module.up.weight'}
    """
    known = set(others)
    here, there = (Counter(map(name_to_compare, side)) for side in (names, others))
    by_short = {name_to_compare(other): other for other in others}
    found = {}
    for name in names:
        short = name_to_compare(name)
        if name in known:
            found[name] = name
        elif here[short] == there[short] == 1:
            found[name] = by_short[short]
    return found


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> canonical name, for all names of a model. Names that would become one keep their own."""
    given = list(names)
    short = [canonical_name(name) for name in given]
    while short and all(name.startswith("module.") and name.count(".") > 1 for name in short):
        short = [name.removeprefix("module.") for name in short]
    return dict(zip(given, short if len(set(short)) == len(set(given)) else given, strict=True))


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, Fabric, DataParallel and DistributedDataParallel: it names the parameters."""
    while True:
        of_fabric = hasattr(model, "_original_module")  # users' models may have a `_forward_module` beside other parts
        inner = getattr(model, "_forward_module" if of_fabric else "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers that keep one (accelerate, Lightning, fastai, SAM, schedule-free)."""
    seen = optimizer
    while (inner := _held(seen)) is not None:
        seen = inner
    if not isinstance(seen, Optimizer):
        hint = " (a Trainer has one from train() on)" if optimizer is None else ""
        hint = " (of several, one call for each)" if isinstance(optimizer, (list, tuple)) else hint
        raise LayerwiseError(f"optimizer is {type(optimizer).__name__}: pass a torch.optim.Optimizer{hint}")
    return seen


def _held(wrapper: Any) -> Optimizer | None:
    """The optimizer that it keeps as `.optimizer`, or the only one that it keeps, under whatever name, if all of it."""
    if isinstance(inner := getattr(wrapper, "optimizer", None), Optimizer):
        return inner
    held = [value for value in getattr(wrapper, "__dict__", {}).values() if isinstance(value, Optimizer)]
    if len(held) != 1 or held[0] is wrapper:
        return None
    part = isinstance(wrapper, Optimizer) and _parameters(wrapper) != _parameters(held[0])  # ZeroRedundancyOptimizer's
    return None if part else held[0]


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def first_few(names: Iterable[str], most: int = 3) -> str:
    """The first of some names, for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
