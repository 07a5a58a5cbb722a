"""The trials of a sweep on this machine, several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

from layerwise.errors import LayerwiseError
from layerwise.lab.experiments.sweep.engines import Failure, Item, Row, reason


@dataclass(frozen=True)
class LocalEngine:
    """`workers` processes of one thread each; 0: this process."""

    workers: int = 2

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise LayerwiseError(f"--workers {self.workers}: use 1 or more, or 0 for this process")

    def results(
        self, function: Callable[[Item], Row], items: Sequence[Item], start: Callable[[int], None]
    ) -> Iterator[Row | Failure[Item]]:
        if self.workers == 0:
            yield from (_here(function, item) for item in items)
            return
        waiting = deque(items)
        while waiting:
            lost = yield from _until_one_dies(function, start, waiting, self.workers)
            # One of them killed its process, or all together were too large: alone, each answers for itself.
            for item in lost:
                if (yield from _until_one_dies(function, start, deque([item]), workers=1)):
                    yield Failure(item, "its process was killed (out of memory?)")


def _here(function: Callable[[Item], Row], item: Item) -> Row | Failure[Item]:
    try:
        return function(item)
    except Exception as error:
        return Failure(item, reason(error))


def _until_one_dies(
    function: Callable[[Item], Row], start: Callable[[int], None], waiting: deque[Item], workers: int
) -> Generator[Row | Failure[Item], None, list[Item]]:
    """Takes items from `waiting` until none is left or a process dies, and returns those that are lost with it.

    At most one item per worker waits in the pool, so that an interruption and a death cost little.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=start, initargs=(1,))
    running: dict[Future[Row], Item] = {}
    lost: list[Item] = []
    try:
        while True:
            while waiting and not lost and len(running) < 2 * workers:
                item = waiting.popleft()
                try:
                    running[pool.submit(function, item)] = item
                except BrokenProcessPool:
                    lost.append(item)
            if not running:
                return lost
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    lost.append(item)
                except Exception as error:
                    yield Failure(item, reason(error))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
