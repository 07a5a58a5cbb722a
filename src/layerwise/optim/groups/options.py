"""The options of a parameter group: their defaults, and the checks that a bad value meets when it is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

from torch import Tensor

from layerwise.common.checked import fits, wanted
from layerwise.common.similar import nearest
from layerwise.errors import LayerwiseError
from layerwise.geometry import Geometry, Layout
from layerwise.geometry.groups import check_dtype
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

#: What of a group is no option: its parameters and their names.
PARAMETERS: Final = ("params", "param_names")
#: What torch and its schedulers write into a group.
TORCH_KEYS: Final = (*PARAMETERS, "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")

#: Options that a group has only where it was given them: "lr_scale" multiplies the rate of every step, and nobody else
#: writes it; "momentum_warmup" is over how many steps the momentum grows, and "momentum_steps" counts them; "rate_steps"
#: counts those under a rule that does not measure at every one; "nu" is what AdamW's average counts in its step, the
#: gradient the rest (1 without it); "rounding" of bfloat16 weights, "rounding_seed" moves on with every step. Groups without
#: are saved as always.
STEP_COUNTS: Final = ("momentum_steps", "rate_steps")
OPTIONAL: Final = ("lr_scale", "momentum_warmup", *STEP_COUNTS, "nu", "rounding", "rounding_seed")
_OPTIONS: Final = (*DEFAULTS, *OPTIONAL)

#: Options of torch's optimizers that change a step and that ours do not have: a true one must not be lost in silence.
_NOT_OURS: Final = ("amsgrad", "dampening", "differentiable", "maximize", "ns_coefficients", "ns_steps")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise :class:`LayerwiseError` for an unknown option or a value outside its range."""
    for key, value in options.items():
        if key not in _OPTIONS and key not in TORCH_KEYS:
            raise _unknown(key, value, nearest(key, _OPTIONS))
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
    for key in _TYPES:
        if key in options:
            check_option(key, options[key], key)


def check_option(key: str, value: object, called: str) -> None:
    """Check one option, which a preset may have under another name, ``called``, that the error then gives."""
    if not fits(value, _TYPES[key]):
        raise LayerwiseError(f"{called}={value!r} in a parameter group: give {wanted(_TYPES[key])}")


def _is_rate(lr: float | Tensor) -> bool:
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            return False
        if lr.device.type != "cpu":  # reading it would wait for the device
            return True
    return 0.0 <= float(lr) <= LARGEST


def _one_of(choices: Iterable[object]) -> str:
    return f"one of {', '.join(map(repr, choices))}"


_FINITE = f"a finite number of at least 0 and at most {LARGEST:g}"
_AtLeastZero = Annotated[float, _FINITE, lambda number: 0.0 <= number <= LARGEST]
_Fraction = Annotated[
    float, "a number from 0 up to, but not including, 1: the weight of the old average", lambda number: 0.0 <= number < 1.0
]
_Whole = Annotated[int, "a whole number from 0 up to 2^31", lambda number: isinstance(number, int) and 0 <= number < 2**31]
_TYPES: Final[dict[str, Any]] = {
    "lr": Annotated[float | Tensor, f"{_FINITE}, or a floating-point tensor holding one", _is_rate],
    "lr_scale": _AtLeastZero,
    "weight_decay": _AtLeastZero,
    "rounding": Annotated[str, _one_of(ROUNDINGS), lambda word: word in ROUNDINGS],
    "rounding_seed": _Whole,
    "radius": _AtLeastZero,
    "eps": _AtLeastZero,
    "momentum": _Fraction,
    "momentum_warmup": _Whole,
    "momentum_steps": _Whole,
    "rate_steps": _Whole,
    "nesterov": bool,
    "nu": Annotated[
        float, "a number from 0 to 1: the weight of the average in the step", lambda number: 0.0 <= number <= 1.0
    ],
    "update": Annotated[
        str | Update, f"{_one_of(UPDATES)}, or a layerwise.Update", lambda kind: isinstance(kind, Update) or kind in UPDATES
    ],
    "scaling": Annotated[str, _one_of(SCALINGS), lambda word: word in SCALINGS],
    "role": Annotated[str | None, "the role's name"],
    "norm_group": Annotated[str | None, "a name shared by the groups whose noise is to be compared"],
    "betas": Annotated[
        Sequence,
        "two numbers in [0, 1), as torch.optim.AdamW takes them",
        lambda betas: len(betas) == 2 and all(fits(beta, _Fraction) for beta in betas),
    ],
    "geometry": Annotated[Geometry | None, "a layerwise.geometry.Geometry such as Spectral()"],
    "layout": Annotated[Layout | None, "the Layout that layerwise.param_groups(model) found"],
    "rates": Annotated[RateRule | None, "a rate rule such as layerwise.NoiseAdaptive(), or None"],
}


def check_parameter(name: str, param: Any) -> None:
    """Raise :class:`LayerwiseError` for what is no leaf tensor of real floating-point numbers."""
    check_dtype(name, param)
    if not (param.is_leaf or param.retains_grad):
        raise LayerwiseError(
            f"parameter {name!r} is the result of a computation ({param.grad_fn}), which never gets a .grad: "
            "give the tensor it was computed from"
        )
