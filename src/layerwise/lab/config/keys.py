"""A tree of sections: dotted keys such as `optimizer.lr`, and what a section written as one word sets; the tree as a config
class, what is wrong in it said in one line that names the nearest valid key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from layerwise.common import similar
from layerwise.common.checked import needed_instead
from layerwise.errors import LayerwiseError

#: `optimizer: lanton` stands for `optimizer: {name: lanton}`.
SHORTHANDS = {
    "model": "preset",
    "data": "source",
    "optimizer": "name",
    "schedule": "name",
    "parallel": "strategy",
    "optimizer.rates": "rule",
}
#: Sections within sections.
SECTIONS = {"optimizer.rates", "model.lora"}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested mappings, making the mappings it passes through.

    A word for a section (`optimizer`, `lanton`) sets the one key it stands for and leaves the section's others.
    """
    if key in SHORTHANDS and isinstance(value, str):
        key = f"{key}.{SHORTHANDS[key]}"
    section, _, last = key.rpartition(".")
    section_at(tree, section)[last] = value


def section_at(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping at a dotted key, made where there is none."""
    parts = key.split(".") if key else []
    for depth, part in enumerate(parts, start=1):
        child, section = tree.get(part), ".".join(parts[:depth])
        if isinstance(child, str) and section in SHORTHANDS:
            child = {SHORTHANDS[section]: child}
        elif child is None:
            child = {}
        if not isinstance(child, dict):
            raise LayerwiseError(f"override {key}: `{section}` is a value, not a section")
        tree[part] = child
        tree = child
    return tree


ConfigT = TypeVar("ConfigT", bound=BaseModel)

#: Sections of one command's configs, where another is given one.
SECTIONS_OF = {"compare": "layerwise compare", "sweep": "layerwise sweep"}
LARGEST = 1e30  # float32 ends at 3e38
MOST_VALUES, DEEPEST = 100_000, 32  # of a config: aliases of YAML can make a short file an endless one


def nearest(word: str, valid: Iterable[str]) -> str:
    """The end of an error message: the nearest valid word, or all of them."""
    words = sorted(valid)
    close = similar.nearest(word, words)
    return f"did you mean `{close[0]}`?" if close else f"valid: {', '.join(words)}"


def validate(schema: type[ConfigT], tree: Any, within: str = "") -> ConfigT:
    """`tree` as a `schema`; what is wrong comes as one LayerwiseError line, its keys prefixed by `within`."""
    check_values(tree, within.removesuffix("."))
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        told = [fault for fault in faults if not _is_no_word(fault, faults)]
        raise LayerwiseError(f"config: {'; '.join(_explain(schema, f, within) for f in told)}") from None


def _is_no_word(fault: Any, faults: Sequence[Any]) -> bool:
    """Whether this says that a value is no such word as `auto`, where another says what is wrong inside of it."""
    *key, kind = fault["loc"]
    within = [other["loc"] for other in faults if list(other["loc"][: len(key)]) == key]
    return str(kind).startswith("literal[") and max(map(len, within)) > len(key) + 1


def check_values(tree: Any, key: str = "") -> None:
    """Raises LayerwiseError for what no key can mean: numbers beyond all use, NUL in a word, sections without end."""
    left = MOST_VALUES
    stack = [(key, tree, 0)]
    while stack:
        key, value, depth = stack.pop()
        left -= 1
        if left < 0 or depth > DEEPEST:
            raise LayerwiseError(f"config: more than {MOST_VALUES} values, or sections within sections {DEEPEST} deep")
        if isinstance(value, dict):
            inner = f"{key}." if key else ""
            stack += [(f"{inner}{name}", item, depth + 1) for name, item in value.items()]
        elif isinstance(value, list | tuple):
            stack += [(key, item, depth + 1) for item in value]
        elif isinstance(value, str) and "\0" in value:
            raise LayerwiseError(f"config: {key}={value!r}: a word cannot hold the character NUL")
        elif isinstance(value, int | float) and not abs(value) <= LARGEST:
            raise LayerwiseError(f"config: {key}={value:.6g}: a number of at most {LARGEST:g} is needed")


def check_arguments(
    function: Callable[..., Any], values: Mapping[str, Any], known: Collection[str], key: str, of: str
) -> None:
    """Raises LayerwiseError for a key of the section `key` that is not `known` (`of` says to what), and for a value that is
    not of the type that `function` says its argument has; see `checked`.
    """
    called = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    for name, value in values.items():
        if name not in known:
            raise LayerwiseError(f"unknown key `{key}.{name}` of {of}: {nearest(name, known)}")
        if (needed := needed_instead(called, name, value)) is not None:
            raise LayerwiseError(f"{key}.{name}={value!r}: give {needed}")


def _explain(schema: type[BaseModel], error: Any, within: str) -> str:
    # Not which of several kinds a value may be of, such as `literal['auto']`.
    key = within + ".".join(str(part) for part in error["loc"] if "[" not in str(part))
    if error["type"] == "extra_forbidden":
        if key in SECTIONS_OF:
            return f"section `{key}` is for `{SECTIONS_OF[key]}`: give it this config, or leave it out"
        *location, word = error["loc"]
        fields = _section_at(schema, location).model_fields
        inside = [f"`{name}.{word}`" for name in schema.model_fields if word in _section_at(schema, [name]).model_fields]
        known = f"did you mean {' or '.join(inside)}?" if inside else nearest(str(word), fields)
        return f"unknown key `{key}`: {known}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and message.startswith(key):  # it names the key itself
        return str(message)
    quoted = ""
    if error["type"] == "string_type" and isinstance(error["input"], bool | int | float):
        quoted = f"; in quotes it is one: '{key}=\"{error['input']}\"'"
    return f"{key}={error['input']!r}: {message[0].lower()}{message[1:]}{quoted}"


def _section_at(schema: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """The section class in which a validation error lies."""
    for part in location:
        field = schema.model_fields.get(str(part))
        # `Section | None` too
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not sections:
            break
        schema = sections[0]
    return schema
