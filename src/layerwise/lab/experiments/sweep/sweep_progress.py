"""What a sweep shows while it runs: a bar on a terminal, about twenty lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self


class SweepProgress:
    """Counts trials; says how long the rest will take."""

    def __init__(self, title: str, total: int, done: int, quiet: bool) -> None:
        self.title, self.total, self.done, self.quiet = title, total, done, quiet
        self._first, self._started = done, time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("trials  last loss {task.fields[loss]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, loss="-")
            self._bar.start()
        return self

    def advance(self, row: dict[str, Any]) -> None:
        """One more result."""
        self.done += 1
        loss = row["status"] if row["val_loss"] is None else f"{row['val_loss']:.3f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, loss=loss)
        elif not self.quiet and (self.done % max(1, self.total // 20) == 0 or self.done == self.total):
            elapsed = time.monotonic() - self._started
            left = elapsed / (self.done - self._first) * (self.total - self.done)
            text = f"{self.title}: {self.done}/{self.total} trials, {left / 60:.1f} min left"
            print(text, file=sys.stderr, flush=True)

    def failed(self, text: str) -> None:
        """One that gave no result: said at once, since the rest may fail likewise."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
            self._bar.console.print(f"failed: {text}", highlight=False, markup=False)
        elif not self.quiet:
            print(f"{self.title}: failed: {text}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
