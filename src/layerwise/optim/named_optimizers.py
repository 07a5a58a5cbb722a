"""The names of optimizers: a class that is registered can be named by a config, a command or a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

from layerwise.common.checked import checked
from layerwise.optim.optimizer import LayerwiseOptimizer
from layerwise.optim.rules.rule import RateRule


class NamedOptimizer(NamedTuple):
    """An optimizer that a config, a command or a table can name.

    Examples:
        >>> lw.optimizers()["namo"].rates.__name__
        'NormAdaptive'
    """

    build: type[LayerwiseOptimizer]
    title: str  # as tables and figures write it
    rates: type[RateRule] | None  # the rate rule that it has by definition


_OPTIMIZERS: Final[dict[str, NamedOptimizer]] = {}
_Class = TypeVar("_Class", bound=type[LayerwiseOptimizer])


@checked
def register_optimizer(name: str, title: str, rates: type[RateRule] | None = None) -> Callable[[_Class], _Class]:
    """Give an optimizer a name; above its class. A class may have several, with different rate rules.

    Args:
        name: in a config and on the command line, such as ``"d-muon"``.
        title: in tables and figures, such as ``"D-Muon"``.
        rates: the rate rule that it has by definition; None: none, or what its signature says.

    Examples:
        >>> @lw.register_optimizer("sign-descent", title="Sign descent")
        ... class SignDescent(lw.LayerwiseOptimizer):
        ...     def __init__(self, params, lr=1e-3, *, weight_decay=0.0):
        ...         signs = {"default": {"geometry": lw.Sign(), "momentum": 0.0}}
        ...         super().__init__(params, signs, lr=lr, weight_decay=weight_decay)
        >>> lw.optimizers()["sign-descent"].title
        'Sign descent'
    """

    def register(cls: _Class) -> _Class:
        _OPTIMIZERS[name] = NamedOptimizer(checked(cls), title, rates)
        return cls

    return register


def optimizers() -> Mapping[str, NamedOptimizer]:
    """All registered optimizers by name.

    Examples:
        >>> lw.optimizers()["d-muon"].title
        'D-Muon'
    """
    return MappingProxyType(_OPTIMIZERS)
