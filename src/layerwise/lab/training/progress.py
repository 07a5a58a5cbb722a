"""What a run shows while it goes: a bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import math
import sys
from typing import Any, Literal, Protocol

from layerwise.errors import LayerwiseError

ProgressKind = Literal["auto", "bar", "plain", "quiet"]


class Progress(Protocol):
    """Told how a run goes. `loss` is in nats per token, `speed` in tokens per second."""

    def start(self, title: str, total: int, done: int) -> None: ...
    def step(self, done: int) -> None: ...
    def numbers(self, done: int, loss: float, speed: float) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


def make_progress(kind: ProgressKind | Progress) -> Progress:
    """`auto` is a bar where standard error is a terminal, and plain lines elsewhere."""
    if not isinstance(kind, str):
        return kind
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() else "plain"
    kinds: dict[str, type[Progress]] = {"bar": BarProgress, "plain": PlainProgress, "quiet": QuietProgress}
    if kind not in kinds:
        raise LayerwiseError(f"progress={kind!r}: one of auto, {', '.join(kinds)}")
    return kinds[kind]()


class QuietProgress:
    """Shows nothing."""

    def start(self, title: str, total: int, done: int) -> None: ...
    def step(self, done: int) -> None: ...
    def numbers(self, done: int, loss: float, speed: float) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class PlainProgress:
    """About ten lines a run on standard error, for logs."""

    def __init__(self) -> None:
        self._title, self._total, self._next = "", 0, 0

    def start(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._next = title, total, done

    def step(self, done: int) -> None: ...

    def numbers(self, done: int, loss: float, speed: float) -> None:
        if done >= self._next or done == self._total:
            self._next = done + math.ceil(self._total / 10)
            self.note(f"step {done}/{self._total}  loss {loss:.4f}  {speed:,.0f} tokens/s")

    def note(self, text: str) -> None:
        print(f"{self._title}: {text}" if self._title else text, file=sys.stderr, flush=True)

    def stop(self) -> None: ...


class BarProgress:
    """A rich progress bar on standard error with loss, speed and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._task: Any = None

    def start(self, title: str, total: int, done: int) -> None:
        self._task = self._bar.add_task(title, total=total, completed=done, loss="-", speed="-")
        self._bar.start()

    def step(self, done: int) -> None:
        self._bar.update(self._task, completed=done)

    def numbers(self, done: int, loss: float, speed: float) -> None:
        self._bar.update(self._task, loss=f"{loss:.4f}", speed=f"{speed:,.0f}")

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        self._bar.stop()
