"""The options of a parameter group: their defaults, and the checks that a bad value meets when it is given."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor

from layerwise.common.similar import nearest
from layerwise.errors import LayerwiseError
from layerwise.geometry import Geometry, Layout
from layerwise.optim.rounding import ROUNDINGS
from layerwise.optim.rules.rule import RateRule
from layerwise.optim.scaling import SCALINGS
from layerwise.optim.updates import UPDATES, Update

#: Of a rate or a decay: float32 ends at 3e38, and a step multiplies them.
LARGEST = 1e30
#: Every option a group can carry, with the value it has unless a preset or the user says otherwise.
DEFAULTS: Final[dict[str, Any]] = {
    "lr": 1e-3,
    "weight_decay": 0.0,  # decoupled: a step multiplies the weights by 1 - lr * weight_decay
    "update": "lmo",  # the kind: "lmo", the geometry's unit step of the momentum; "adamw"; or an Update
    "momentum": 0.95,  # lmo: weight of the old average, M <- momentum * M + (1 - momentum) * G
    "nesterov": False,  # lmo: step along momentum * M + (1 - momentum) * G instead of M
    "scaling": "unit",  # lmo: static factor by shape, see layerwise.optim.scaling
    "radius": 1.0,  # lmo: static factor by group (Scion's radius)
    "rates": None,  # lmo: the rule that sets each unit's rate; None keeps every multiplier at 1
    "betas": (0.9, 0.95),  # adamw
    "eps": 1e-8,  # adamw
    "role": None,
    "layout": None,
    "geometry": None,
    "norm_group": None,  # whose noise is compared with whose; None: all units of one geometry family
}

#: Options that are objects. A state_dict holds them as text: it then loads anywhere, and a checkpoint
#: of another geometry is told apart.
DESCRIBED: Final = ("layout", "geometry", "rates", "update")

#: What torch and its schedulers write into a group.
TORCH_KEYS: Final = (
    "params",
    "param_names",
    "initial_lr",
    "max_lr",
    "min_lr",
    "base_momentum",
    "max_momentum",
)

#: Options that a group has only where it was given them: "lr_scale" multiplies the rate of every step, and nobody else
#: writes it; "rounding" of bfloat16 weights, "rounding_seed" moves on with every step. Groups without are saved as always.
OPTIONAL: Final = ("lr_scale", "rounding", "rounding_seed")
_OPTIONS: Final = (*DEFAULTS, *OPTIONAL)

#: Options of torch's optimizers that change a step and that ours do not have: a true one must not be lost in silence.
_NOT_OURS: Final = ("amsgrad", "dampening", "differentiable", "maximize", "ns_coefficients", "ns_steps")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise :class:`LayerwiseError` for an unknown option or a value outside its range."""
    for key, value in options.items():
        if key not in _OPTIONS and key not in TORCH_KEYS:
            raise _unknown(key, value, nearest(key, _OPTIONS, cutoff=0.6))
    _check_values(options)


def check_group(group: Mapping[str, Any]) -> None:
    """As :func:`check_options`, but keys of the user's own are let through, as torch does: ``name``, SAM's ``rho``."""
    for key, value in group.items():
        if key in _OPTIONS or key in TORCH_KEYS:
            continue
        near = nearest(key, _OPTIONS, cutoff=0.8)
        if near or (key in _NOT_OURS and value):
            raise _unknown(key, value, near)
    _check_values(group)


def own_keys(group: Mapping[str, Any]) -> dict[str, Any]:
    """What is in a group and neither ours nor torch's: the user's."""
    return {key: value for key, value in group.items() if key not in _OPTIONS and key not in TORCH_KEYS}


def _unknown(key: str, value: object, near: list[str]) -> LayerwiseError:
    hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(sorted(_OPTIONS))}"
    return LayerwiseError(f"unknown option {key!r} (value {value!r}) in a parameter group: {hint}")


def _check_values(options: Mapping[str, Any]) -> None:
    for key, check in _CHECKS.items():
        if key in options:
            check(key, options[key])


def check_option(key: str, value: object, called: str) -> None:
    """Check one option that a preset has under another name, ``called``, which the error then gives."""
    _CHECKS[key](called, value)


def _fail(key: str, value: object, fix: str) -> LayerwiseError:
    return LayerwiseError(f"{key}={value!r} in a parameter group: {fix}")


def _as_number(key: str, value: object, fix: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _fail(key, value, fix)
    return float(value)


def _learning_rate(key: str, value: object) -> None:
    fix = f"give a finite number of at least 0 and at most {LARGEST:g}, or a floating-point tensor holding one"
    if not isinstance(value, Tensor):
        _at_least_zero(key, value, fix)
    elif value.numel() != 1 or not value.is_floating_point():
        raise _fail(key, value, fix)
    elif value.device.type == "cpu":  # reading it elsewhere would wait for the device
        _at_least_zero(key, float(value), fix)


def _at_least_zero(
    key: str, value: object, fix: str = f"give a finite number of at least 0 and at most {LARGEST:g}"
) -> None:
    if not 0.0 <= _as_number(key, value, fix) <= LARGEST:
        raise _fail(key, value, fix)


def _whole(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise _fail(key, value, "give a whole number from 0 up to 2^31")


def _fraction(key: str, value: object) -> None:
    fix = "give a number from 0 up to, but not including, 1: the weight of the old average"
    if not 0.0 <= _as_number(key, value, fix) < 1.0:
        raise _fail(key, value, fix)


def _betas(key: str, value: object) -> None:
    fix = "give two numbers in [0, 1), as torch.optim.AdamW takes them"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise _fail(key, value, fix)
    for beta in value:
        if not 0.0 <= _as_number(key, beta, fix) < 1.0:
            raise _fail(key, value, fix)


def _one_of(*choices: object) -> Callable[[str, object], None]:
    def check(key: str, value: object) -> None:
        if not isinstance(value, (str, bool)) or value not in choices:
            raise _fail(key, value, f"give one of {', '.join(map(repr, choices))}")

    return check


def _update(key: str, value: object) -> None:
    if not isinstance(value, Update) and (not isinstance(value, str) or value not in UPDATES):
        raise _fail(key, value, f"give one of {', '.join(map(repr, UPDATES))}, or a layerwise.Update")


def _instance(kind: type, what: str) -> Callable[[str, object], None]:
    def check(key: str, value: object) -> None:
        if value is not None and not isinstance(value, kind):
            raise _fail(key, value, f"give {what}")

    return check


_CHECKS: Final[dict[str, Callable[[str, object], None]]] = {
    "lr": _learning_rate,
    "lr_scale": _at_least_zero,
    "weight_decay": _at_least_zero,
    "rounding": _one_of(*ROUNDINGS),
    "rounding_seed": _whole,
    "radius": _at_least_zero,
    "eps": _at_least_zero,
    "momentum": _fraction,
    "nesterov": _one_of(True, False),
    "update": _update,
    "scaling": _one_of(*SCALINGS),
    "role": _instance(str, "the role's name"),
    "norm_group": _instance(str, "a name shared by the groups whose noise is to be compared"),
    "betas": _betas,
    "geometry": _instance(Geometry, "a layerwise.geometry.Geometry such as Spectral()"),
    "layout": _instance(Layout, "the Layout that layerwise.param_groups(model) found"),
    "rates": _instance(RateRule, "a rate rule such as layerwise.NoiseAdaptive(), or None"),
}


def check_parameter(name: str, param: object) -> None:
    """Raise :class:`LayerwiseError` for what is no leaf tensor of real floating-point numbers."""
    if not isinstance(param, Tensor):
        raise LayerwiseError(f"parameter {name!r} is {param!r}: give a tensor, such as nn.Parameter")
    if not (param.is_leaf or param.retains_grad):
        raise LayerwiseError(
            f"parameter {name!r} is the result of a computation ({param.grad_fn}), which never gets a .grad: "
            "give the tensor it was computed from"
        )
    if param.is_complex() or not param.is_floating_point():
        raise LayerwiseError(
            f"parameter {name!r} has dtype {param.dtype}: only real floating-point parameters have a geometry; "
            "freeze it (requires_grad=False) or give its real and imaginary parts as parameters of their own"
        )
