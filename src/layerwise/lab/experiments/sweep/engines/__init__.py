"""Where the trials of a sweep run: in this process, in processes beside it, or on a Ray cluster.

An engine maps a function over items and hands results back as they come. It knows nothing of sweeps: what has been done
already, and what is written where, is the business of `layerwise.lab.experiments.sweep.run_sweep`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from layerwise.errors import LayerwiseError

Item = TypeVar("Item")
Row = dict[str, Any]


@dataclass(frozen=True)
class Failure(Generic[Item]):
    """An item that gave no result, and why."""

    item: Item
    reason: str


class Engine(Protocol):
    """Runs a function on items."""

    def results(
        self, function: Callable[[Item], Row], items: Sequence[Item], start: Callable[[int], None]
    ) -> Iterator[Row | Failure[Item]]:
        """A result or a failure for each item, in the order they end.

        `start` is called in each process that is made for this, with the number of its threads, before any item. All
        three must be picklable. An exception or a killed process fails its own item and no other. Closing the
        iterator, as an interruption does, abandons what is running. Raises LayerwiseError where nothing can be run.
        """
        ...


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, LayerwiseError) and text else f"{type(error).__name__}: {text}"
