"""Reading a config: YAML files, folders of runs, and `key=value` overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from layerwise.errors import LayerwiseError
from layerwise.lab.config.keys import SECTIONS, section_at, set_key, validate
from layerwise.lab.config.schema import Config
from layerwise.lab.runs.directory import read_run

RunConfigT = TypeVar("RunConfigT", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-3` is a number, `no` and `on` are words."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, word) for tag, word in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # numbers of thousands of digits; depth
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise LayerwiseError(f"{source}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LayerwiseError(f"config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    tree = parse_yaml(text, f"config {path}")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise LayerwiseError(f"config {path}: expected sections such as `optimizer:`, found {type(tree).__name__}")
    return tree


def read_tree(path: str | Path) -> dict[str, Any]:
    """The sections in a YAML file or, for the folder of a run, the config it was started with."""
    folder = Path(path)
    if not os.path.isdir(folder):  # false of what is too long for a name, too
        return read_yaml(path)
    tree = read_run(folder).config
    tree.setdefault("run", {}).update(dir=str(folder.parent), name=folder.name)
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    """Applies `key=value` words, in order; values are YAML. Keys of a section that a mapping does not name stay."""
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key or not all(key.split(".")):
            raise LayerwiseError(f"override {override!r}: write key=value, for example optimizer.lr=1e-3")
        _merge(tree, key, parse_yaml(text, f"override {override!r}"))


def _merge(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a key, or of a mapping for a section those that it names."""
    if isinstance(value, dict) and ("." not in key or key in SECTIONS):
        section_at(tree, key)  # `model.lora={}` is a section at its defaults
        for name, item in value.items():
            _merge(tree, f"{key}.{name}", item)
    else:
        set_key(tree, key, value)


def load_config(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    schema: type[RunConfigT] = Config,  # type: ignore[assignment]
) -> RunConfigT:
    """A validated config from a YAML file or a run's folder (none: the defaults) and `key=value` overrides.

    `schema` may be a subclass of `Config` with further sections. Raises LayerwiseError.
    """
    tree = {} if path is None else read_tree(path)
    apply_overrides(tree, overrides)
    return _cut_short(validate(schema, tree))


def _cut_short(config: RunConfigT) -> RunConfigT:
    """With the environment's LAYERWISE_MOST_STEPS no run takes more steps: to see whether commands work."""
    most = os.environ.get("LAYERWISE_MOST_STEPS")
    if not most:
        return config
    if not most.isdecimal() or int(most) < 1:
        raise LayerwiseError(f"LAYERWISE_MOST_STEPS={most!r}: a number of steps is needed, from 1")
    return config.replace({"training.steps": min(int(most), config.training.steps)})
