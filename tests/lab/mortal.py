"""Work that ends as its name says. Imports nothing of ours, so that a process for it starts quickly."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any


def work(item: str, threads: int, folder: Path) -> dict[str, Any]:
    """Notes in `folder` that `item` was tried; what happens then is its name."""
    assert threads == 1
    tries = folder / item
    with open(tries, "a") as file:
        file.write("x")
    if item == "raises":
        raise ValueError("7 is odd")
    if item == "dies" or (item == "dies once" and tries.read_text() == "x"):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"item": item}
