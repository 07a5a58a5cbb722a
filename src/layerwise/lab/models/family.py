"""What a family of models is to the lab: how one is built, what its settings are called, what its sizes and blocks are.

A new family is one file in this folder: a subclass of `Family` under `@register`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from layerwise.errors import LayerwiseError

Axis = Literal["width", "depth", "init_scale", "lora_rank"]
AXIS_NAMES: dict[Axis, str] = {
    "width": "width", "depth": "blocks", "init_scale": "initial scale", "lora_rank": "LoRA rank",
}  # fmt: skip
Settings = dict[str, Any]


@dataclass(frozen=True)
class Examples:
    """What the data gives a model: token ids of `vocab_size` kinds, or rows of `features` in `vocab_size` classes."""

    vocab_size: int
    seq_len: int
    features: int | None = None


class Family(ABC):
    """A kind of model.

    Attributes:
        name: in a config's `model.family`.
        blocks: what its blocks are called, for depth maps: `blocks.*`.
        layers: the settings whose product is their number.
        presets: names for `model.preset`, each with its settings.
    """

    name: ClassVar[str]
    blocks: ClassVar[str]
    layers: ClassVar[tuple[str, ...]]
    presets: ClassVar[dict[str, Settings]]

    @abstractmethod
    def setting_defaults(self) -> dict[str, Any]:
        """Keywords of the architecture that a config may set, with what they are by default."""

    @abstractmethod
    def build(self, settings: Settings, examples: Examples, attention: str) -> nn.Module:
        """A model from the global random state. Raises LayerwiseError."""

    def resize(self, settings: Settings, axis: Axis, value: float) -> Settings:
        """The settings that change for a size: hidden size, number of blocks, or factor on the initial weights.

        `settings`: all of them, with the defaults of those that the config leaves out.
        """
        raise LayerwiseError(f"axis {axis} is not known for the family {self.name}")


FAMILIES: dict[str, Family] = {}


def register(family: type[Family]) -> type[Family]:
    """Makes a family known to configs."""
    FAMILIES[family.name] = family()
    return family


def tokens_only(examples: Examples, what: str) -> None:
    """Raises LayerwiseError for data that are no token ids."""
    if examples.features is not None:
        raise LayerwiseError(f"{what} reads token ids, data.source gives images: use model=resmlp")


def keywords_of(function: Callable[..., Any], without: Container[str]) -> dict[str, Any]:
    """Its keyword-only arguments and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    keywords = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {p.name: p.default for p in keywords if p.name not in without}


def size_of_heads(width: Any, heads: Any) -> int:
    """Raises LayerwiseError where the width cannot be shared out among the heads."""
    if not (isinstance(width, int) and isinstance(heads, int)) or width % heads:
        raise LayerwiseError(f"model: a width of {width} is not a multiple of {heads} heads")
    return int(width // heads)


def whole(axis: Axis, value: float, of: float = 1) -> int:
    """How many times `of` goes into a size. Raises LayerwiseError where that is no whole number."""
    quotient = value / of
    if quotient != int(quotient) or quotient < 1:
        need = "a whole number" if of == 1 else f"a multiple of {of:g}"
        raise LayerwiseError(f"{axis}={value:g}: must be {need}")
    return int(quotient)
