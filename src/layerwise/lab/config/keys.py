"""Dotted keys: `optimizer.lr` in nested sections, and what a section written as one word sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    *parents, last = key.split(".")
    node = tree
    for depth, part in enumerate(parents):
        child, section = node.get(part), ".".join(parents[: depth + 1])
        if isinstance(child, str) and section in SHORTHANDS:
            child = {SHORTHANDS[section]: child}
        elif child is None:
            child = {}
        if not isinstance(child, dict):
            raise LayerwiseError(f"override {key}: `{section}` is a value, not a section")
        node[part] = child
        node = child
    node[last] = value
