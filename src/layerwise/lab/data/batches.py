"""What a run trains on: batches that are a pure function of seed and step, so that a resumed run goes on exactly.

Of text, or of small images as rows of features: scikit-learn's digits, Fashion-MNIST where Debian's package is installed.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import Config, DataConfig
from layerwise.lab.data.tokens import Ids, load_tokens

Starts = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

#: Where Debian's package `dataset-fashion-mnist` puts its files; `data.paths` names another folder.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


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


def load_images(config: DataConfig) -> tuple[Features, Labels]:
    """Images `[count, features]` standardised over all pixels, and their classes. Raises LayerwiseError."""
    if config.source == "digits":
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        pixels, labels = bunch.data, bunch.target
    else:
        folder = Path(config.paths[0]).expanduser() if config.paths else FASHION_MNIST
        pixels = _read_idx(folder / "train-images-idx3-ubyte.gz", 16)
        labels = _read_idx(folder / "train-labels-idx1-ubyte.gz", 8)
        if len(labels) == 0 or len(pixels) % len(labels):
            raise LayerwiseError(
                f"data.source=fashion-mnist: {folder} holds {len(labels)} labels and {len(pixels)} pixels: a file of it is"
                " damaged or another"
            )
        pixels = pixels.reshape(len(labels), -1)
    images = pixels.astype(np.float32)
    return (images - images.mean()) / images.std(), labels.astype(np.int64)


def _read_idx(path: Path, header: int) -> npt.NDArray[np.uint8]:
    """The bytes of an IDX file after its header."""
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read()[header:], dtype=np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise LayerwiseError(
            f"data.source=fashion-mnist: {path}: {getattr(error, 'strerror', None) or error}; install Debian's package"
            " dataset-fashion-mnist, or name the folder of its four files in data.paths"
        ) from None


class ImageData:
    """Batches of images, a pure function of seed and step: the counterpart of `TextData`.

    The images are cut into training and held-out ones by a fixed shuffle, the same for every seed.
    """

    def __init__(self, config: Config) -> None:
        images, labels = load_images(config.data)
        order = np.random.default_rng(0).permutation(len(labels))
        held_out = round(config.data.validation_fraction * len(labels))
        self._train = order[held_out:]
        self._images, self._labels = images, labels
        self.features: int | None = images.shape[1]
        self.vocab_size = int(labels.max()) + 1
        self.seed, self.batch_size = config.training.seed, config.training.batch_size
        if held_out < 1:
            raise LayerwiseError(
                f"data.validation_fraction={config.data.validation_fraction} of the {len(labels)} images of"
                f" data.source={config.data.source} holds none out: raise data.validation_fraction"
            )
        self._evaluated = order[:held_out][: config.training.eval_batches * self.batch_size]
        if len(self._train) < self.batch_size:
            raise LayerwiseError(
                f"training.batch_size={self.batch_size}: data.source={config.data.source} has only"
                f" {len(self._train)} training images"
            )
        self.info: dict[str, Any] = {
            "source": config.data.source,
            "name": config.data.source,
            "sha256": hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
            "vocab_size": self.vocab_size,
            "features": self.features,
            "train_images": len(self._train),
            "validation_images": held_out,
        }

    def batch(self, step: int) -> Batch:
        """The whole batch of an optimizer step, from 0: every pass goes through the images in a new order."""
        first, count = step * self.batch_size, len(self._train)
        epochs = range(first // count, (first + self.batch_size - 1) // count + 1)
        orders = [np.random.default_rng([self.seed, epoch]).permutation(self._train) for epoch in epochs]
        start = first % count
        return self._gather(np.concatenate(orders)[start : start + self.batch_size])

    def validation(self, sequences: int) -> Iterator[Batch]:
        """The held-out images, `sequences` at a time; the last batch can be smaller."""
        for first in range(0, len(self._evaluated), sequences):
            yield self._gather(self._evaluated[first : first + sequences])

    def _gather(self, rows: npt.NDArray[np.int64]) -> Batch:
        return Batch(torch.from_numpy(self._images[rows]), torch.from_numpy(self._labels[rows]))


def open_data(config: Config) -> TextData | ImageData:
    """The data that a config names. Raises LayerwiseError where there is none, or too little for one batch."""
    return ImageData(config) if config.data.holds_images else TextData(config)
