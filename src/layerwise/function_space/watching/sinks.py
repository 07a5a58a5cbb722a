"""Where records go: a function, a file of JSON lines, TensorBoard, wandb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.function_space.steps.watched_step import JsonLines
from layerwise.function_space.watching.watch_record import WatchRecord

Sink = Callable[[WatchRecord], object]


class TensorBoardScalars:
    """Writes a record's numbers with a `SummaryWriter`."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __call__(self, record: WatchRecord) -> None:
        for key, value in record.scalars().items():
            self.writer.add_scalar(key, value, record.step)


class WandbScalars:
    """Logs a record's numbers to a wandb run, or to `wandb` itself once `wandb.init` was called."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, record: WatchRecord) -> None:
        # wandb counts steps of its own, which the user's other calls move on: ours goes along as a number.
        self.run.log({**record.scalars(), "watch/step": record.step}, commit=False)


def sinks_of(to: Any) -> list[Sink]:
    """What `watch(to=...)` means: nothing, a path, a SummaryWriter, a wandb run, a function, or a list of these.

    Raises:
        LayerwiseError: for anything else.
    """
    if to is None:
        return []
    if isinstance(to, (list, tuple)):
        return [sink for each in to for sink in sinks_of(each)]
    if isinstance(to, (str, Path)):
        return [JsonLines(to)]
    if hasattr(to, "add_scalar"):
        return [TensorBoardScalars(to)]
    if callable(to):
        return [to]
    if hasattr(to, "log"):
        return [WandbScalars(to)]
    raise LayerwiseError(
        f"to is {type(to).__name__}: give a path, a function, a SummaryWriter, a wandb run, or a list of these"
    )
