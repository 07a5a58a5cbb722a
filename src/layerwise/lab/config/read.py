"""Reading a config: YAML files, `key=value` overrides, and errors that name the nearest valid key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import Config
from layerwise.lab.runs.directory import read_run

ConfigT = TypeVar("ConfigT", bound=BaseModel)

# `optimizer: lanton` stands for `optimizer: {name: lanton}`.
SHORTHANDS = {
    "model": "preset",
    "data": "source",
    "optimizer": "name",
    "schedule": "name",
    "parallel": "strategy",
}

#: Sections of one command's configs, where another is given one.
SECTIONS_OF = {"compare": "layerwise compare", "sweep": "layerwise sweep"}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-3` is a number, `no` and `on` are words."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text. Errors name `source` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise LayerwiseError(f"{source}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LayerwiseError(f"config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LayerwiseError(f"config {path}: cannot be read: {error}") from None
    tree = parse_yaml(text, f"config {path}")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise LayerwiseError(
            f"config {path}: expected sections such as `optimizer:`, found {type(tree).__name__}"
        )
    return tree


def read_tree(path: str | Path) -> dict[str, Any]:
    """The sections in a YAML file or, for the folder of a run, the config it was started with."""
    folder = Path(path)
    try:
        is_run = folder.is_dir()
    except OSError:  # too long for a name
        is_run = False
    if not is_run:
        return read_yaml(path)
    tree = read_run(folder).config
    tree.setdefault("run", {}).update(dir=str(folder.parent), name=folder.name)
    return tree


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested mappings, making the mappings it passes through."""
    *parents, last = key.split(".")
    node = tree
    for depth, part in enumerate(parents):
        child = node.get(part)
        if isinstance(child, str) and depth == 0 and part in SHORTHANDS:
            child = {SHORTHANDS[part]: child}
        elif child is None:
            child = {}
        if not isinstance(child, dict):
            raise LayerwiseError(
                f"override {key}: `{'.'.join(parents[: depth + 1])}` is a value, not a section"
            )
        node[part] = child
        node = child
    node[last] = value


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Applies `key=value` words, in order; values are YAML."""
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key or not all(key.split(".")):
            raise LayerwiseError(f"override {override!r}: write key=value, for example optimizer.lr=1e-3")
        set_key(tree, key, parse_yaml(text, f"override {override!r}"))


def nearest(word: str, valid: Iterable[str]) -> str:
    """The end of an error message: the nearest valid word, or all of them."""
    words = sorted(valid)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"valid: {', '.join(words)}"


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
    mend = ""
    if error["type"] == "string_type" and isinstance(error["input"], bool | int | float):
        mend = f"; in quotes it is one: '{key}=\"{error['input']}\"'"
    return f"{key}={error['input']!r}: {message[0].lower()}{message[1:]}{mend}"


def validate(schema: type[ConfigT], tree: Any, within: str = "") -> ConfigT:
    """`tree` as a `schema`; what is wrong comes as one LayerwiseError line, its keys prefixed by `within`."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        raise LayerwiseError(
            "config: " + "; ".join(_explain(schema, fault, within) for fault in faults)
        ) from None


def load_config(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    schema: type[ConfigT] = Config,  # type: ignore[assignment]
) -> ConfigT:
    """A validated config from a YAML file or a run's folder (none: the defaults) and `key=value` overrides.

    `schema` may be a subclass of `Config` with further sections. Raises LayerwiseError.
    """
    tree = {} if path is None else read_tree(path)
    apply_overrides(tree, overrides)
    return validate(schema, tree)
