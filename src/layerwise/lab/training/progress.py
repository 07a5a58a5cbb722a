"""What is said while runs and sweeps go: about ten lines, or nothing."""

from __future__ import annotations

import math
import sys
import time

from layerwise.lab.runs.recorded import duration


class QuietProgress:
    """Told how far something is, `done` of `total` steps (or trials), and what to say beside that; shows nothing."""

    def start(self, title: str, total: int, done: int) -> None: ...
    def numbers(self, done: int, text: str) -> None: ...
    def note(self, text: str) -> None: ...


class PlainProgress(QuietProgress):
    """About ten lines on standard error, each with the time left.

    Args:
        title: shown instead of the one that `start` is given.
        unit: what is counted.
    """

    def __init__(self, title: str = "", unit: str = "step") -> None:
        self.title, self.unit = title, unit

    def start(self, title: str, total: int, done: int) -> None:
        self.title = self.title or title
        self._total, self._first, self._next, self._started = total, done, 0, time.monotonic()

    def numbers(self, done: int, text: str) -> None:
        if done < self._next and done != self._total:
            return
        self._next = done + math.ceil(self._total / 10)
        left = (time.monotonic() - self._started) / max(1, done - self._first) * (self._total - done)
        more = f", {duration(left)} left" if left >= 1 else ""
        self.note(f"{self.unit} {done}/{self._total}  {text}{more}")

    def note(self, text: str) -> None:
        print(f"{self.title}: {text}" if self.title else text, file=sys.stderr, flush=True)
