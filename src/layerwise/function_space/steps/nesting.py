"""Steps within steps: when one begins, and when all that belongs to it is over."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

#: The function that torch wraps around each class's `step`, hooks and all.
_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__

#: Of each optimizer whose step is surrounded, what is to be done once that is over.
_UNDER_WAY: WeakKeyDictionary[Optimizer, list[Callable[[], None]]] = WeakKeyDictionary()


def is_outermost(optimizer: Optimizer) -> bool:
    """Called from a hook of `optimizer.step`: whether no other step of the same optimizer called this one.

    An optimizer whose `step` calls that of its base class has torch call every hook twice.
    """
    steps, frame = 0, sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is _WRAPPER and frame.f_locals["args"][0] is optimizer:
            steps += 1
    return steps <= 1


@contextmanager
def under_way(optimizer: Optimizer) -> Iterator[None]:
    """Surrounds a step and what is done to it afterwards: FLeRM redoes the steps that it matches."""
    if optimizer in _UNDER_WAY:  # a recorder around FLeRM, or the other way round
        yield
        return
    waiting = _UNDER_WAY.setdefault(optimizer, [])
    try:
        yield
    finally:
        del _UNDER_WAY[optimizer]
    for function in waiting:
        function()


def when_over(optimizer: Optimizer, function: Callable[[], None]) -> None:
    """Call a function once the optimizer's step is over: at once, unless something surrounds the step."""
    waiting = _UNDER_WAY.get(optimizer)
    if waiting is None:
        function()
    else:
        waiting.append(function)
