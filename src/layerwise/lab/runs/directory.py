"""The run directory: written as training goes, read back tolerantly; what `run.json` says of versions, machine, parameters.

    runs/NAME/
      run.json              what ran and how it ended (see `Run.info`)
      metrics.jsonl         a line per logged step
      layers.jsonl          a line per recorded step
      function_space.jsonl  a line per measured step
      checkpoints/          see checkpoint.py
      tensorboard/          the same numbers as TensorBoard events

A killed run can leave half a last line. Reading ignores it; resuming truncates every file to the length it
had at the checkpoint, so a resumed run's files are those of an uninterrupted one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import torch
from pydantic import BaseModel, ValidationError
from torch import nn

from layerwise.common.files import plain_json, write_whole
from layerwise.errors import LayerwiseError
from layerwise.geometry import describe
from layerwise.lab.runs.recorded import Run

RUN_FILE = "run.json"
STREAMS = ("metrics", "layers", "function_space")
FORMAT = 1


class _Parameter(BaseModel):
    """A row of the parameter table."""

    name: str
    shape: list[Any] | None = None


class _RunFile(BaseModel, strict=True):
    """What entries of run.json are, where they are there; others are not looked at."""

    format: Literal[1]
    name: str | None = None
    status: Literal["running", "finished", "diverged"] = "running"  # any other word would count as ended
    config: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    machine: dict[str, Any] | None = None
    corpus: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    parameters: list[_Parameter] | None = None


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file as a whole: a reader sees the old text or the new one."""
    write_whole(path, json.dumps(plain_json(value), indent=1, allow_nan=False) + "\n")


def has_ended(path: Path) -> bool:
    """Whether there is a run in `path` with nothing left to do: finished or diverged."""
    return (path / RUN_FILE).is_file() and read_run(path).status != "running"


def in_the_way(path: Path) -> list[str]:
    """What lies in a folder where a run is to be written, folders with a slash; not what a killed writer leaves."""
    if not path.is_dir():
        return []
    own = (".lock", f"{RUN_FILE}.")
    return sorted(item.name + "/" * item.is_dir() for item in path.iterdir() if not item.name.startswith(own))


def cleared_away(path: Path) -> list[str]:
    """What of a folder a run deletes when it begins there anew, whoever wrote it."""
    ours = {"checkpoints/", "tensorboard/", RUN_FILE, *(f"{stream}.jsonl" for stream in STREAMS)}
    return [name for name in in_the_way(path) if name in ours]


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


def read_run(path: str | Path) -> Run:
    """The run in a directory. Raises LayerwiseError where there is none, or run.json is damaged."""
    folder = Path(path)
    try:
        info = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        _RunFile.model_validate(info)
    except (FileNotFoundError, NotADirectoryError):
        raise LayerwiseError(f"run {folder}: no {RUN_FILE} there; name a folder that `layerwise train` wrote") from None
    except ValueError as error:  # no UTF-8, no JSON, or other entries than a run has
        what = str(error)
        if isinstance(error, ValidationError):
            fault = error.errors()[0]
            what = f"{(*fault['loc'], 'all of it')[0]} is {fault['input']!r:.60}"
        raise LayerwiseError(
            f"run {folder}: {RUN_FILE} is damaged ({what}), or of another version; move the folder away, or train again"
            " with --overwrite"
        ) from None
    return Run(folder, info)


def locked(file: IO[Any], wait: bool = False) -> bool:
    """Whether this process alone has an open file until it is closed; with `wait` it has it when no other has it more."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def find_runs(folder: str | Path) -> Iterator[Path]:
    """Every run directory at or below `folder`, in sorted order."""
    return (file.parent for file in sorted(Path(folder).rglob(RUN_FILE)))


def _lock_file(path: Path) -> IO[Any]:
    """A file to lock, in a folder that is made where it is not there. Raises LayerwiseError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "w")
    except OSError as error:
        raise LayerwiseError(f"run.dir, run.name: cannot make or write in {path.parent}: {error.strerror}") from None


@contextmanager
def claimed(folder: Path, name: str, wait: bool) -> Iterator[bool]:
    """Whether this process alone has the work of a name in a folder, until the block ends or the process dies.

    With `wait` it has it, as soon as the process that does ends its own.
    """
    with _lock_file(folder / f".{name}.lock") as file:
        yield locked(file, wait)


class RunWriter(AbstractContextManager["RunWriter"]):
    """The one writer of a run directory, which it locks until it is closed or its process dies."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = _lock_file(self.path / ".lock")
        if not locked(self._lock):
            self._lock.close()
            raise LayerwiseError(f"run {self.path}: another process is writing it; wait, or set run.name")
        self._info: dict[str, Any] = {}
        self._events: Any = None

    def _stream(self, name: str) -> Path:
        return self.path / f"{name}.jsonl"

    def update(self, **entries: Any) -> None:
        """Sets entries of run.json and writes it as a whole."""
        self._info = {"format": FORMAT, **self._info, **entries}
        write_json(self.path / RUN_FILE, self._info)

    def append(self, stream: str, row: dict[str, Any]) -> None:
        """Adds a line to `metrics`, `layers` or `function_space`; it is on its way to the disk at once."""
        line = json.dumps(plain_json(row), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with open(self._stream(stream), "ab", buffering=0) as file:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        if self._events is not None and stream != "function_space":
            numbers = {key: value for key, value in row.items() if isinstance(value, float) and key != "seconds"}
            for unit, rate in row.get("layers", {}).items():
                numbers |= {f"{key}/{unit}": value for key, value in rate.items()}
            for key, value in numbers.items():
                self._events.add_scalar(key, value, row["step"])

    def add_tensorboard(self, step: int) -> None:
        """From `step` on, metrics and layer rates are TensorBoard events too."""
        from torch.utils.tensorboard import SummaryWriter

        # Events after the step a run resumes from are those of the killed process: TensorBoard hides them.
        self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1 if step else None)

    def lengths(self) -> dict[str, int]:
        """Bytes in each stream, for `truncate`. The bytes are on the disk when this returns."""
        found = {}
        for name in filter(lambda name: self._stream(name).exists(), STREAMS):
            with open(self._stream(name), "ab") as file:
                os.fsync(file.fileno())
                found[name] = file.tell()
        return found

    def truncate(self, lengths: dict[str, int]) -> list[str]:
        """Cuts each stream to the length it had; one that `lengths` does not name is emptied.

        Returns:
            The streams that are shorter than they were, or gone: of those the whole lines are kept.
        """
        there = {name: self._stream(name).stat().st_size for name in STREAMS if self._stream(name).exists()}
        short = [name for name, wanted in lengths.items() if there.get(name, -1) < wanted]
        for name in there:
            whole_lines = self._stream(name).read_bytes().rfind(b"\n") + 1
            os.truncate(self._stream(name), whole_lines if name in short else lengths.get(name, 0))
        return short

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
        if not (self.path / RUN_FILE).exists():  # ended before it began: leave no folder behind
            (self.path / ".lock").unlink(missing_ok=True)
            with suppress(OSError):  # not empty: it was there before
                self.path.rmdir()
        self._lock.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class SilentWriter(RunWriter):
    """In the writer's place on processes that write nothing, because another one does."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def update(self, **entries: Any) -> None: ...
    def append(self, stream: str, row: dict[str, Any]) -> None: ...
    def add_tensorboard(self, step: int) -> None: ...
    def close(self) -> None: ...

    def truncate(self, lengths: dict[str, int]) -> list[str]:
        return []

    def lengths(self) -> dict[str, int]:
        return {}


_COLUMNS = ("name", "role", "geometry", "norm_group", "shape", "layout", "units")
_PACKAGES = ("layerwise", "torch", "transformers", "datasets", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Python and the packages a run's numbers depend on."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on. No host name."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def parameter_table(model: nn.Module) -> list[dict[str, Any]]:
    """The rows of `describe(model)`, of the columns that are the same on one process and on several."""
    rows = [{**vars(row), "geometry": repr(row.geometry), "layout": str(row.layout)} for row in describe(model).rows]
    return [{column: row[column] for column in _COLUMNS} for row in rows]
