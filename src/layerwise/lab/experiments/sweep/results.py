"""The results of a sweep: one JSONL file, a line per finished trial, written by one process."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from layerwise.errors import LayerwiseError
from layerwise.lab.runs.directory import read_lines


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Results by trial id; half a last line, left by a killed process, does not count."""
    return {str(row["id"]): row for row in read_lines(path) if "id" in row}


def loss_of(row: Mapping[str, Any], key: str) -> float:
    """`loss` or `val_loss` of a result; infinite where the run diverged."""
    value = row.get(key)
    return float(value) if row.get("status") == "finished" and value is not None else math.inf


class ResultsFile:
    """The file, locked while it is written to."""

    def __init__(self, path: Path) -> None:
        """Cuts off half a last line. Raises LayerwiseError where another process writes this sweep."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "ab+")  # noqa: SIM115 - held until close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise LayerwiseError(f"sweep {path.parent}: another process is running it") from None
        self._file.seek(0)
        text = self._file.read()
        self._file.truncate(text.rfind(b"\n") + 1)

    def append(self, row: dict[str, Any]) -> None:
        """One line in one write, on the disk when this returns."""
        self._file.write(json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
