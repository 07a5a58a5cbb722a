"""Small images as rows of features: scikit-learn's digits, and Fashion-MNIST where Debian's package is installed."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import Config, DataConfig
from layerwise.lab.data.batches import Batch

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

#: Where Debian's package `dataset-fashion-mnist` puts its files; `data.paths` names another folder.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


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
