"""Records as lines of JSON in a file of the user's, which a resumed run goes on with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from layerwise.common.files import write_whole
from layerwise.errors import LayerwiseError, warn


class JsonLines:
    """A sink that appends each record (its `to_dict()`) to a file as one line of JSON.

    Lines of another run that are there already are left, and told of at the first record.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a").close()
        except OSError as error:
            raise LayerwiseError(f"{path}: cannot be written to ({error.strerror}): name a file for the records") from None
        self._others = self.path.is_file() and self.path.stat().st_size > 0

    def __call__(self, record: Any) -> None:
        if self._others:
            self._others = False
            warn(
                f"{self.path} holds records already, and those of this run come after them: name another file, or, to go on "
                "with a run, load_state_dict() what was saved with its checkpoint"
            )
        with self.path.open("a") as file:
            file.write(json.dumps(record.to_dict()) + "\n")

    def rewind(self, step: int) -> None:
        """Go on from a checkpoint: drop the records from `step` on, which the run takes again."""
        self._others = False
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_whole(self.path, "".join(line for line in lines if _step_of(line) < step))


def _step_of(line: str) -> float:
    """The step of a record: after all others of one that a kill cut off, before all of what is no record."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf
    except (KeyError, TypeError):
        return -math.inf
