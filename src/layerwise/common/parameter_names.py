"""The one name of a parameter, whatever is wrapped around the model that holds it."""

from __future__ import annotations

from collections.abc import Iterable

#: Steps of a dotted name that wrappers put in: `torch.compile`, activation checkpointing, FSDP1.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def canonical_name(name: str) -> str:
    """A parameter's name without the steps that wrappers add inside or around a model.

    `module.` of DistributedDataParallel is an attribute's ordinary name too; `canonical_names` takes it off where all
    names of a model begin with it.

    Examples:
        >>> canonical_name("_orig_mod.blocks.0._checkpoint_wrapped_module.mlp.weight")
        'blocks.0.mlp.weight'
    """
    return ".".join(step for step in name.split(".") if step not in _WRAPPERS)


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> canonical name, for all names of a model. Names that would become one keep their own."""
    given = list(names)
    short = [canonical_name(name) for name in given]
    while short and all(name.startswith("module.") and name.count(".") > 1 for name in short):
        short = [name.removeprefix("module.") for name in short]
    return dict(zip(given, short if len(set(short)) == len(set(given)) else given, strict=True))
