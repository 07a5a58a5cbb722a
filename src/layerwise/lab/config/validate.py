"""A tree of sections as a config class, what is wrong in it said in one line that names the nearest valid key."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from layerwise.common import similar
from layerwise.errors import LayerwiseError

ConfigT = TypeVar("ConfigT", bound=BaseModel)

#: Sections of one command's configs, where another is given one.
SECTIONS_OF = {"compare": "layerwise compare", "sweep": "layerwise sweep"}


def nearest(word: str, valid: Iterable[str]) -> str:
    """The end of an error message: the nearest valid word, or all of them."""
    words = sorted(valid)
    close = similar.nearest(word, words)
    return f"did you mean `{close[0]}`?" if close else f"valid: {', '.join(words)}"


def validate(schema: type[ConfigT], tree: Any, within: str = "") -> ConfigT:
    """`tree` as a `schema`; what is wrong comes as one LayerwiseError line, its keys prefixed by `within`."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        raise LayerwiseError(
            "config: " + "; ".join(_explain(schema, fault, within) for fault in faults)
        ) from None


def _explain(schema: type[BaseModel], error: Any, within: str) -> str:
    key = within + ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        if key in SECTIONS_OF:
            return (
                f"section `{key}` is for `{SECTIONS_OF[key]}`: give it this config, or leave the section out"
            )
        section = _section_at(schema, error["loc"][:-1])
        return f"unknown key `{key}`: {nearest(str(error['loc'][-1]), section.model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return str(message)
    quoted = ""
    if error["type"] == "string_type" and isinstance(error["input"], bool | int | float):
        quoted = f"; in quotes it is one: '{key}=\"{error['input']}\"'"
    return f"{key}={error['input']!r}: {message[0].lower()}{message[1:]}{quoted}"


def _section_at(schema: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """The section class in which a validation error lies."""
    for part in location:
        field = schema.model_fields.get(str(part))
        kinds = (
            [] if field is None else [field.annotation, *get_args(field.annotation)]
        )  # `Section | None` too
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not sections:
            break
        schema = sections[0]
    return schema
