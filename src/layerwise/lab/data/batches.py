"""What a run trains on: batches that are a pure function of seed and step, so that a resumed run goes on exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import Config
from layerwise.lab.data.tokens import Ids, load_tokens

if TYPE_CHECKING:
    from layerwise.lab.data.images import ImageData

Starts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Token ids: `inputs` and the next tokens `targets`, both int64 [sequences, seq_len]; or features and classes."""

    inputs: Tensor
    targets: Tensor

    def split(self, parts: int) -> list[Batch]:
        """Equal micro-batches, in order."""
        return list(map(Batch, self.inputs.chunk(parts), self.targets.chunk(parts)))

    def __len__(self) -> int:
        """Sequences."""
        return len(self.inputs)

    def share(self, rank: int, world: int) -> Batch:
        """The part of process `rank` of `world`, in order; they differ by one sequence at most."""
        return Batch(self.inputs.tensor_split(world)[rank], self.targets.tensor_split(world)[rank])

    def to(self, device: torch.device) -> Batch:
        return Batch(self.inputs.to(device, non_blocking=True), self.targets.to(device, non_blocking=True))


class Sampler:
    """Sequences in an order drawn anew for every pass over the text.

    A pass cuts the ids into sequences at a random phase and shuffles them: no sequence comes twice in a pass.
    What stands at a position depends on the seed and the position alone.
    """

    def __init__(self, ids: Ids, seq_len: int, seed: int) -> None:
        self.ids, self.seq_len, self.seed = ids, seq_len, seed
        self.sequences = max(0, (len(ids) - seq_len) // seq_len)  # the same at every phase
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> Starts:
        generator = np.random.default_rng([self.seed, epoch])
        phase = generator.integers(self.seq_len)
        return phase + self.seq_len * generator.permutation(self.sequences)

    def starts(self, position: int, count: int) -> Starts:
        """Where the sequences number `position` to `position + count` of the whole training start."""
        numbers = range(position, position + count)
        return np.array([self._order(n // self.sequences)[n % self.sequences] for n in numbers])


def gather(ids: Ids, starts: Starts, seq_len: int) -> Batch:
    """The sequences at `starts`, with their next tokens."""
    rows = torch.from_numpy(np.stack([ids[start : start + seq_len + 1] for start in starts]).astype(np.int64))
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


class TextData:
    """Batches of text. Steps count from 0: `batch(0)` is the first optimizer step's.

    Attributes:
        vocab_size: kinds of token ids; of images, classes.
        features: of an example that is not a row of tokens.
        info: what the record of a run says of the data; `sha256` tells it from other data.
    """

    features: int | None = None  # an example is a row of tokens

    def __init__(self, config: Config) -> None:
        """Raises LayerwiseError where the text is too short for one batch."""
        files = load_tokens(config.data)
        self.vocab_size, self.info = files.vocab_size, files.info
        self.seq_len, self.batch_size = config.data.seq_len, config.training.batch_size
        self.sampler = Sampler(files.train, self.seq_len, config.training.seed)
        if self.sampler.sequences < self.batch_size:
            needed = (self.batch_size + 1) * self.seq_len
            raise LayerwiseError(
                f"data: the training text has {len(files.train)} tokens, one batch of training.batch_size="
                f"{self.batch_size} sequences of data.seq_len={self.seq_len} needs {needed}:"
                " give more text or lower one of the two"
            )
        self._validation = files.validation
        available = (len(files.validation) - 1) // self.seq_len
        if available < 1:
            raise LayerwiseError(
                f"data: the validation text has {len(files.validation)} tokens, one sequence of data.seq_len="
                f"{self.seq_len} needs {self.seq_len + 1}: raise data.validation_fraction or give more text"
            )
        wanted = min(available, config.training.eval_batches * self.batch_size)
        # Spread evenly over the held-out text.
        self.validation_starts = np.arange(wanted) * available // wanted * self.seq_len

    def batch(self, step: int) -> Batch:
        """The whole batch of an optimizer step."""
        starts = self.sampler.starts(step * self.batch_size, self.batch_size)
        return gather(self.sampler.ids, starts, self.seq_len)

    def validation(self, sequences: int) -> Iterator[Batch]:
        """The held-out sequences, `sequences` at a time; the last batch can be smaller."""
        for first in range(0, len(self.validation_starts), sequences):
            yield gather(self._validation, self.validation_starts[first : first + sequences], self.seq_len)


def open_data(config: Config) -> TextData | ImageData:
    """The data that a config names. Raises LayerwiseError where there is none, or too little for one batch."""
    if config.data.holds_images:
        from layerwise.lab.data.images import ImageData

        return ImageData(config)
    return TextData(config)
