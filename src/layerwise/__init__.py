"""Layerwise learning rates for PyTorch.

import layerwise as lw
print(lw.describe(model))
optimizer = lw.Lanton(lw.param_groups(model), lr=2e-3, weight_decay=0.1)
optimizer.layer_rates()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from layerwise.errors import *  # noqa: F403
    from layerwise.function_space import *  # noqa: F403
    from layerwise.geometry import *  # noqa: F403
    from layerwise.optim import *  # noqa: F403
    from layerwise.optim import DistributedWork  # noqa: F401 - lazy there, which griffe's star leaves out

__version__ = "0.1.0"

#: What is public: the names in their `__all__`. They are imported when the first of them is asked for: Ctrl-C in the seconds
#: that torch takes then comes to the command line, which ends quietly.
_ROOMS: Final = ("errors", "geometry", "optim", "function_space")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"layerwise.{name}")
    if name == "__all__":
        return sorted(["__version__", *(each for room in _rooms() for each in room.__all__)])
    for room in _rooms() if not name.startswith("_") else ():
        if name in room.__all__:
            return globals().setdefault(name, getattr(room, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _rooms() -> list[Any]:
    return [import_module(f"layerwise.{name}") for name in _ROOMS]


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
