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
