"""Arguments that are of the types a signature says: one check for every public function and class."""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import types
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from layerwise.common.similar import nearest
from layerwise.errors import LayerwiseError

_Target = TypeVar("_Target", bound=Callable[..., Any])

#: Whole numbers with a bound, for signatures.
PositiveInt = Annotated[int, "a whole number from 1 on", lambda number: number >= 1]
NonNegativeInt = Annotated[int, "a whole number from 0 on", lambda number: number >= 0]


def checked(target: _Target) -> _Target:
    """Check every call of a function, or construction of a class, against the types of its signature.

    Types are taken as they stand, with one exception: a whole number is a number. ``True`` is no number, and a word such as
    ``"off"`` is no truth. ``Annotated[kind, "words"]`` says in the words what to give, and
    ``Annotated[kind, "words", holds]`` takes only values for which ``holds(value)``.

    Raises:
        LayerwiseError: from the call, naming the parameter, its value and what it takes.

    Examples:
        >>> lw.Muon(lw.param_groups(nn.Linear(4, 4)), nesterov="off")
        Traceback (most recent call last):
            ...
        layerwise.errors.LayerwiseError: Muon(nesterov='off'): give True or False
    """
    if not isinstance(target, type):
        return _checking(target, target.__name__)
    own = vars(target).get("__init__")  # none: it is the base class's, and checked there
    if own is not None and not hasattr(own, "checks"):
        setattr(target, "__init__", _checking(own, target.__name__))  # noqa: B010 (mypy refuses the assignment)
    return target


class UnknownArgumentError(LayerwiseError):
    """A keyword that a function does not take, nor what it hands its options on to."""

    def __init__(self, called: str, name: str, value: Any, known: Iterable[str]) -> None:
        self.name, self.value = name, value
        self.known = [each for each in dict.fromkeys(known) if each not in ("self", "cls")]
        near = nearest(name, self.known)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(self.known)}"
        super().__init__(f"{called}({name}={_short(value)}): there is no {name!r}; {hint}")

    def __reduce__(self) -> tuple[type[LayerwiseError], tuple[str]]:
        return LayerwiseError, (str(self),)  # to another process the message goes


def _checking(function: Any, called: str) -> Any:
    signature = inspect.signature(function)
    own = [name for name, each in signature.parameters.items() if each.kind is not each.VAR_KEYWORD]
    hands_on = len(own) < len(signature.parameters)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind_partial(*args, **kwargs).arguments
        except TypeError:
            for name in kwargs.keys() - signature.parameters.keys():
                raise UnknownArgumentError(called, name, kwargs[name], own) from None
            given = {}  # too many, or one twice: Python's own words say it
        for name, value in given.items():
            if (needed := needed_instead(function, name, value)) is not None:
                raise LayerwiseError(f"{called}({name}={_short(value)}): give {needed}")
        try:
            return function(*args, **kwargs)
        except UnknownArgumentError as error:
            if not (hands_on and error.name in kwargs):
                raise
            raise UnknownArgumentError(called, error.name, error.value, [*own, *error.known]) from None

    call.checks = function  # type: ignore[attr-defined]
    return call


def needed_instead(function: Callable[..., Any], name: str, value: Any) -> str | None:
    """In words what an argument takes, where this value is none of it."""
    hints = _hints(function)
    return wanted(hints[name]) if name in hints and not fits(value, hints[name]) else None


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's arguments; a type that is imported for the type checker alone is not checked."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        hints = {}
        for name, text in getattr(function, "__annotations__", {}).items():
            try:
                hints[name] = eval(text, function.__globals__) if isinstance(text, str) else text
            except (NameError, TypeError):
                continue
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            hints.pop(parameter.name, None)
    return hints


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type. What cannot be told is let through."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin is Annotated:
        return fits(value, inner[0]) and all(holds(value) for holds in inner[2:])
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if hint in _PLAIN:
        return _PLAIN[hint](value)
    if origin is None:
        return not isinstance(hint, type) or isinstance(value, hint)  # a protocol has to be runtime_checkable
    return _fits_made_of(value, origin, inner)


def _fits_made_of(value: Any, origin: Any, inner: tuple[Any, ...]) -> bool:
    """Of a type that is made of others, such as ``tuple[float, float]``."""
    if origin is type:
        return isinstance(value, type) and (not isinstance(inner[0], type) or issubclass(value, inner[0]))
    if issubclass(origin, Callable):  # type: ignore[arg-type]
        return callable(value)
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items()
        )
    if origin is Iterable:  # what comes of it shows when it is read
        return isinstance(value, Iterable) or inner[0] is Any
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping, Set)):
        return False
    if origin is tuple and inner[-1] is not Ellipsis:
        return isinstance(value, Sequence) and (
            len(value) != len(inner) or all(map(fits, value, inner))
        )  # of another length: the function's own words say how many
    return isinstance(value, Sized) and all(fits(item, inner[0]) for item in value)


def wanted(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return str(inner[1])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(wanted(part) for part in inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is tuple and inner[-1] is not Ellipsis:
        several = {float: "numbers", int: "whole numbers", str: "words"}.get(inner[0], "values")
        return f"{_COUNTS.get(len(inner), len(inner))} {several}"
    if origin is type:
        return f"a class, {wanted(inner[0])}"
    if origin is not None and issubclass(origin, Callable):  # type: ignore[arg-type]
        return "a function"
    if origin is not None and issubclass(origin, Mapping):
        return f"a dict, each key {wanted(inner[0])} and each value {wanted(inner[1])}"
    if origin is not None:
        return "a list" if inner[0] is Any else f"a list, each of it {wanted(inner[0])}"
    if hint in _WORDS:
        return _WORDS[hint]
    example = ""
    if ABC in getattr(hint, "__bases__", ()):  # one of ours, and the same one whatever was imported first
        ours = [kind.__name__ for kind in hint.__subclasses__() if kind.__module__.startswith("layerwise.")]
        example = f" such as {min(ours)}()" if ours else ""  # none of a user's own base
    return f"a {getattr(hint, '__name__', hint)}{example}"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind) and not isinstance(value, bool)


_PLAIN: Final[dict[Any, Callable[[Any], bool]]] = {
    float: _is(numbers.Real),
    int: _is(numbers.Integral),
    bool: lambda value: isinstance(value, bool),
    Path: lambda value: isinstance(value, os.PathLike),
}
_COUNTS: Final = {2: "two", 3: "three"}
_WORDS: Final[dict[Any, str]] = {
    float: "a number",
    int: "a whole number",
    bool: "True or False",
    str: "a word",
    Path: "a path",
    type(None): "None",
    Any: "anything",
}
