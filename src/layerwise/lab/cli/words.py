"""Words of a command line: a config, `key=value`, lists of numbers."""

from __future__ import annotations

import math
import os
import shlex
import sys
from contextlib import suppress
from typing import Annotated

import typer

from layerwise.errors import LayerwiseError

Words = Annotated[list[str] | None, typer.Argument(metavar="CONFIG KEY=VALUE", help="A config and overrides.")]


def split_words(words: list[str] | None) -> tuple[str | None, list[str]]:
    """`[CONFIG] [key=value...]` told apart: a word with `=` is an override, the one without is the config."""
    words = words or []
    overrides = [word for word in words if "=" in word and not os.path.exists(word)]
    configs = [word for word in words if word not in overrides]
    if len(configs) > 1:
        raise LayerwiseError(f"one config at most, got {', '.join(configs)}; overrides are written key=value")
    return (configs[0] if configs else None), overrides


def numbers(text: str, option: str) -> list[float]:
    """`64,128,256` as numbers. Raises LayerwiseError."""
    with suppress(ValueError):
        found = [float(word) for word in text.split(",")]
        if all(map(math.isfinite, found)):
            return found
    raise LayerwiseError(f"{option} {text!r}: write finite numbers with commas between them, such as 64,128")


def whole_numbers(text: str, option: str) -> list[int]:
    """`1,10,100` as whole numbers. Raises LayerwiseError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise LayerwiseError(f"{option} {text!r}: write whole numbers from 0 with commas between them, such as 1,10")
    return list(map(int, words))


def seeds_of(text: str) -> list[int]:
    """`0,1` as seeds, each once: a mean over seeds would count one twice. Raises LayerwiseError."""
    seeds = whole_numbers(text, "--seeds")
    if len(set(seeds)) < len(seeds):
        raise LayerwiseError(f"--seeds {text!r}: a seed stands there twice; write each once, such as 0,1")
    return seeds


def command_line() -> str:
    """The command that was given, as it can be given again."""
    return shlex.join(["layerwise", *sys.argv[1:]])
