"""Saved numbers in the kind the optimizer holds them in: some tools write a tensor of one entry as a plain float."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from layerwise.common.tensors import is_sharded
from layerwise.optim.work.job import State


def in_kind(own: State, saved: State) -> State:
    """``saved`` with every number as a tensor where ``own`` has one of one entry under its key, and the other way."""
    return {key: _alike(own.get(key), value) for key, value in saved.items()}


def _alike(mine: Any, theirs: Any) -> Any:
    if is_number(theirs) and isinstance(mine, Tensor) and mine.numel() == 1 and not is_sharded(mine):
        return torch.full(tuple(mine.shape), float(theirs), dtype=mine.dtype)
    if is_number(mine) and isinstance(theirs, Tensor) and theirs.numel() == 1:
        return type(mine)(theirs.item())
    return theirs


def is_number(value: object) -> bool:
    """Whether it is a plain number; a truth is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def same_kind(mine: object, theirs: object) -> bool:
    """Whether one can stand for the other: both tensors, both numbers, or both of one class."""
    if isinstance(mine, Tensor) or isinstance(theirs, Tensor):
        return isinstance(mine, Tensor) and isinstance(theirs, Tensor)
    return (is_number(mine) and is_number(theirs)) or type(mine) is type(theirs)
