"""What is shown while runs and sweeps go: a bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, Literal

from layerwise.errors import LayerwiseError
from layerwise.lab.runs.quantities import duration

ProgressKind = Literal["auto", "bar", "plain", "quiet"]


class QuietProgress:
    """Told how far something is, `done` of `total` steps (or trials), and what to say beside that; shows nothing."""

    def __init__(self, title: str = "", unit: str = "step") -> None:
        self.title, self.unit = title, unit

    def start(self, title: str, total: int, done: int) -> None: ...
    def step(self, done: int) -> None: ...
    def numbers(self, done: int, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class PlainProgress(QuietProgress):
    """About ten lines on standard error, for logs, each with the time left."""

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


class BarProgress(QuietProgress):
    """A rich progress bar on standard error with the numbers and the time left."""

    _bar: Any = None

    def start(self, title: str, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(self.title or title, total=total, completed=done, text="")
        self._bar.start()

    def step(self, done: int) -> None:
        self._bar.update(self._task, completed=done)

    def numbers(self, done: int, text: str) -> None:
        self._bar.update(self._task, completed=done, text=text)

    def note(self, text: str) -> None:
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def make_progress(kind: ProgressKind | QuietProgress, title: str = "", unit: str = "step") -> QuietProgress:
    """A display of a kind: `auto` is a bar where standard error is a terminal, and plain lines elsewhere.

    Args:
        kind: or a display of one's own, which is returned.
        title: shown instead of the one that `start` is given.
        unit: what is counted.
    """
    if not isinstance(kind, str):
        return kind
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() else "plain"
    kinds = {"bar": BarProgress, "plain": PlainProgress, "quiet": QuietProgress}
    if kind not in kinds:
        raise LayerwiseError(f"progress={kind!r}: one of auto, {', '.join(kinds)}")
    return kinds[kind](title, unit)
