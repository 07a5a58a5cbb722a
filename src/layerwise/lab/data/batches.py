"""What a run trains on: batches that are a pure function of seed and step, so that a resumed run goes on exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from layerwise.lab.config.schema import Config


@dataclass(frozen=True)
class Batch:
    """Token ids: `inputs` and the next tokens `targets`, both int64 [sequences, seq_len]; or features and classes."""

    inputs: Tensor
    targets: Tensor

    def split(self, parts: int) -> list[Batch]:
        """Equal micro-batches, in order."""
        return [
            Batch(inputs, targets)
            for inputs, targets in zip(self.inputs.chunk(parts), self.targets.chunk(parts), strict=True)
        ]

    def __len__(self) -> int:
        """Sequences."""
        return len(self.inputs)

    @classmethod
    def join(cls, parts: Sequence[Batch]) -> Batch:
        """One batch of several, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))

    def share(self, rank: int, world: int) -> Batch:
        """The part of process `rank` of `world`, in order; they differ by one sequence at most."""
        return Batch(self.inputs.tensor_split(world)[rank], self.targets.tensor_split(world)[rank])

    def to(self, device: torch.device) -> Batch:
        return Batch(self.inputs.to(device, non_blocking=True), self.targets.to(device, non_blocking=True))


class Batches(Protocol):
    """The data of a run.

    Attributes:
        vocab_size: kinds of token ids, or classes.
        features: of an example that is not a row of tokens.
        info: what the record of a run says of the data; `sha256` tells it from other data.
    """

    vocab_size: int
    features: int | None
    info: dict[str, Any]

    def batch(self, step: int) -> Batch:
        """The whole batch of an optimizer step, counted from 0."""
        ...

    def validation(self, sequences: int) -> Iterator[Batch]:
        """The held-out examples, `sequences` at a time; the last batch can be smaller."""
        ...


def open_data(config: Config) -> Batches:
    """The data that a config names. Raises LayerwiseError where there is none, or too little for one batch."""
    if config.data.holds_images:
        from layerwise.lab.data.images import ImageData

        return ImageData(config)
    from layerwise.lab.data.text import TextData

    return TextData(config)
