"""Files that a command writes where it is told to: looked at before the work whose result they are to hold."""

from __future__ import annotations

import tempfile
from pathlib import Path

from layerwise.errors import LayerwiseError


def check_output(path: Path, ours: str) -> None:
    """For before the work, which would be lost: the file can be written, and nobody else's stands there.

    Args:
        path: The file; folders above it need not exist yet.
        ours: Words near the beginning of every file that the command itself writes there.

    Raises:
        LayerwiseError: The file could not be written, or would take the place of one of another kind.
    """
    try:
        if path.is_dir():
            raise LayerwiseError(f"-o: {path} is a folder: name a file, such as {path / 'base.json'}")
        if path.exists() and not path.is_file():
            raise LayerwiseError(f"-o: {path} is not a plain file: name another")
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
        head = path.read_bytes()[:4096] if path.exists() else b""
    except OSError as error:
        raise LayerwiseError(
            f"-o: {path} cannot be written ({error.strerror}): name a file in a folder that can be written to"
        ) from None
    if head and ours.encode() not in head:
        raise LayerwiseError(
            f"-o: {path} exists, and not as what would be written there: it is left as it is; move it away, or name another"
        )
