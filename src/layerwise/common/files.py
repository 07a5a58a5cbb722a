"""Writing a file as a whole, and numbers as JSON has them."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError


def write_whole(path: str | Path, text: str) -> None:
    """Write text to a file so that a reader, or a machine that stops, finds the old text or the new one.

    It is written beside the file first, brought to the disk, and then takes the file's place. A link goes on pointing
    to the file.

    Raises:
        OSError: it cannot be written there; an older file stays as it was, and so does a device such as /dev/null.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def save_as(path: str | Path, text: str, called: str) -> None:
    """Write what a user saves under a path of theirs, as a whole.

    Raises:
        LayerwiseError: it cannot be written there; `called` is what it is.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        reason = f"{called} {str(path)!r} cannot be written ({error.strerror})"
        raise LayerwiseError(f"{reason}: name a file in a folder that can be written to") from None


def plain_json(value: Any) -> Any:
    """Dicts, lists and numbers as JSON has them: NaN and infinities, which it lacks, are null.

    Example:
        >>> plain_json({"loss": float("nan"), "lrs": (0.1, 0.2)})
        {'loss': None, 'lrs': [0.1, 0.2]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return value
