"""The results of a sweep: one JSONL file, a line per finished trial, written by one process."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from layerwise.errors import LayerwiseError
from layerwise.lab.runs.directory import in_the_way, lock
from layerwise.lab.runs.recorded import number

RESULTS = "results.jsonl"


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Results by trial id. Lines that are none, such as half a last one of a killed process, do not count."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("id"), str):
                rows[row["id"]] = row
    return rows


def check_folder(folder: Path) -> None:
    """Raises LayerwiseError where something else than a sweep is in its place."""
    there = in_the_way(folder)
    begun = there == [RESULTS] and not (folder / RESULTS).stat().st_size
    if there and "sweep.json" not in there and not begun and not read_results(folder / RESULTS):
        raise LayerwiseError(
            f"run.name: {folder} holds {', '.join(there[:5])} and no sweep.json, so it is no sweep of ours: it is left"
            " as it is; set another run.name"
        )


def loss_of(row: Mapping[str, Any], key: str) -> float:
    """`loss` or `val_loss` of a result; infinite where the run diverged."""
    value = number(row.get(key))
    return value if row.get("status") == "finished" and math.isfinite(value) else math.inf


@contextmanager
def open_results(path: Path) -> Iterator[BinaryIO]:
    """The file, locked while it is written to, half a last line cut off.

    Raises LayerwiseError where another process writes this sweep.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        lock(file, f"sweep {path.parent}: another process is running it")
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield file


def append_result(file: BinaryIO, row: dict[str, Any]) -> None:
    """One line in one write, on the disk when this returns."""
    file.write(json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
