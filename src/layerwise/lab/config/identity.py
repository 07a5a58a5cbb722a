"""When two configs are the same run: the one answer for `--resume`, `compare`, `sweep` and reports.

A run is told by what its result depends on. Where it is written, how often it is saved and how many processes share it
do not count: with the processes only the order of sums changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from layerwise.lab.config.keys import flatten
from layerwise.lab.config.schema import Config

#: What may differ between a run and its continuation: sections, and keys of one.
FREE: dict[str, Any] = {"run": True, "parallel": True, "training": {"keep", "checkpoint_every"}}


def decisive(config: Config) -> dict[str, Any]:
    """The sections of a complete config without what is free and what is at its default: a run to be made again by."""
    return config.model_dump(exclude=FREE, exclude_defaults=True)


def identity(config: Mapping[str, Any], corpus: str | None = None) -> dict[str, Any]:
    """What a run's result depends on, by dotted key.

    Args:
        config: the sections of a complete config, as run.json has them.
        corpus: the hash of the text, where it is known. A file of text may have moved: the hash stands in for its path.

    Returns:
        The keys that are neither free nor at their default, which is null for those that this version does not have: a
        key that only another version has changes no run.
    """
    flat = {key: value for key, value in flatten(config).items() if not _is_free(key) and value != _defaults().get(key)}
    if corpus is None:
        return flat
    return {**{k: v for k, v in flat.items() if k != "data.paths"}, "corpus": corpus}


def _is_free(key: str) -> bool:
    section, _, name = key.partition(".")
    return FREE.get(section) is True or name in FREE.get(section, ())


def hashed(identity: Any) -> str:
    """Plain values as a hash."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
    keys = sorted(old.keys() | new.keys())
    values = {key: [side.get(key, _defaults().get(key)) for side in (old, new)] for key in keys}
    return [f"{key} was {was!r}, is {now!r}" for key, (was, now) in values.items() if was != now]


@cache
def _defaults() -> dict[str, Any]:
    return flatten(Config().model_dump())
