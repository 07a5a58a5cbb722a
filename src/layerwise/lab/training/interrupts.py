"""Ctrl-C between steps: a run is stopped when its state and its records are whole, and not inside a library's lock."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Whether the run was asked to stop."""

    asked = False

    def take(self) -> None:
        """Raises KeyboardInterrupt where it was. For between two steps."""
        if self.asked:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C is remembered, a second one ends the run at once."""
        self.take()
        self.asked = True


@contextmanager
def between_steps() -> Iterator[Interrupts]:
    """Inside, Ctrl-C waits until `take` is called. A program that ignores it, as in the background, goes on doing so."""
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():  # which alone is sent it
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupts._handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
