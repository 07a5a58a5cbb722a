"""Groups of plain parameters, by their shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from layerwise.common.checked import checked
from layerwise.errors import LayerwiseError, warn
from layerwise.geometry.declared import overridden
from layerwise.geometry.found import Found
from layerwise.geometry.layout import ConvLayout, Layout, MatrixLayout, VectorLayout


@checked
def group_by_shape(params: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Groups as of `param_groups` for plain `model.parameters()` or `model.named_parameters()`, by shape alone.

    2-D tensors become hidden matrices, 0-D and 1-D ones vectors (not decayed), all others convolutions; a UserWarning
    says what a shape cannot tell. Parameters without names are called `param_0`, `param_1`, ...

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     groups = lw.group_by_shape(nn.Linear(4, 8).named_parameters())
        >>> [(group["role"], group["params"][0][0]) for group in groups]
        [('hidden', 'weight'), ('vector', 'bias')]
    """
    named = [item if isinstance(item, tuple) else (f"param_{i}", item) for i, item in enumerate(params)]
    if not named:
        raise LayerwiseError("no parameters: give model.parameters() of a model that has some")
    if len({id(p) for _, p in named}) < len(named):
        raise LayerwiseError("a parameter is given twice: give every tensor once")
    warn(
        "parameters are grouped by shape alone, which cannot tell an embedding or an output head from a hidden "
        "matrix, nor (in, out) storage (transformers' Conv1D) from (out, in), nor q, k and v in one weight, nor "
        "experts from a convolution; give layerwise.param_groups(model) instead (to transformers' Trainer: "
        "optimizer_cls_and_kwargs=layerwise.integrations.transformers.trainer_optimizer(...))"
    )
    groups: dict[str, dict[str, Any]] = {}
    for name, p in named:
        check_dtype(name, p)
        assigned = overridden(Found(name, p, *_by_shape(tuple(p.shape))), {})
        found, geometry = assigned.found, assigned.geometry
        kind = {"role": found.role, "layout": found.layout, "geometry": geometry, **assigned.options}
        groups.setdefault(repr((found.role, geometry)), {"params": [], **kind})["params"].append((name, p))
    return list(groups.values())


def _by_shape(shape: tuple[int, ...]) -> tuple[str, Layout, tuple[int, ...]]:
    if len(shape) <= 1:
        return "vector", VectorLayout(), ()
    if len(shape) == 2:
        return "hidden", MatrixLayout(), ()
    return "conv", ConvLayout(), shape[2:]


def check_dtype(name: str, p: Any) -> None:
    if not isinstance(p, Tensor):
        raise LayerwiseError(f"{name} is {type(p).__name__}; parameters are tensors or (name, tensor) pairs")
    if p.is_complex():
        raise LayerwiseError(f"{name} is complex ({p.dtype}): train its view_as_real, or freeze it")
    if not p.is_floating_point():
        raise LayerwiseError(f"{name} is of type {p.dtype}: freeze it (requires_grad=False) or make it floating-point")
