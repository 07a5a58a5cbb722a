"""Where text comes from: a corpus is an ordered set of documents with a hash."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError, warn
from layerwise.lab.config.schema import DataConfig

# Left out of the built-in text: tests, tables of numbers, generated files, and what some installations lack.
_NOT_PROSE = {
    "test", "tests", "idle_test", "idlelib", "turtledemo", "tkinter", "lib2to3", "encodings", "pydoc_data",
    "ensurepip", "site-packages", "dist-packages", "lib-dynload", "__pycache__",
}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order. `documents()` starts anew each time: a corpus need not fit in memory."""

    name: str
    documents: Callable[[], Iterator[str]]
    sha256: str
    count: int
    characters: int

    @classmethod
    def of(cls, name: str, documents: Callable[[], Iterator[str]]) -> Corpus:
        """Reads every document once, for the hash and the sizes."""
        digest, count, characters = hashlib.sha256(), 0, 0
        for document in documents():
            text = document.encode("utf-8", errors="surrogatepass")
            digest.update(len(text).to_bytes(8, "little"))  # so that moving a boundary changes the hash
            digest.update(text)
            count += 1
            characters += len(document)
        if characters == 0:
            raise LayerwiseError(f"data: {name} holds no text")
        return cls(name, documents, digest.hexdigest(), count, characters)


def read_corpus(config: DataConfig) -> Corpus:
    """The corpus that `data.source` names (any but `tokens`). Raises LayerwiseError."""
    if config.source == "builtin":
        return _builtin()
    if config.source == "files":
        if not config.paths:
            raise LayerwiseError("data.paths is empty: name the text files or folders of data.source=files")
        files, root = _text_files(config.paths), ", ".join(config.paths)
        return Corpus.of(root, lambda: map(_read_text, files))
    return Corpus.of(f"dataset {config.dataset}", _dataset(config))


@cache
def _builtin() -> Corpus:
    """Read once in a process: a sweep trains on it many times."""
    root = Path(os.__file__).parent
    files = [
        path
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
        if not _NOT_PROSE.intersection(parts := path.relative_to(root).parts)
        and not parts[0].startswith("config-")
        and not path.name.startswith("_sysconfigdata")
    ]
    name = f"Python {platform.python_version()} standard library"
    return Corpus.of(name, lambda: (file.read_text(encoding="utf-8", errors="replace") for file in files))


def _text_files(paths: list[str]) -> list[Path]:
    files: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            there = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
            found = [file for file in there if _is_text(file)]
            if not found:
                raise LayerwiseError(f"data.paths: no text files in folder {name}")
            if left_out := [file.name for file in there if file not in set(found)]:
                warn(f"data.paths: {len(left_out)} files of {name} are no UTF-8 text and left out, {left_out[0]} the first")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise LayerwiseError(f"data.paths: {name}: no such file or folder")
    return files


def _is_text(path: Path) -> bool:
    """Whether its first 65,536 characters are UTF-8, with or without a byte-order mark, and no NUL."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return "\0" not in file.read(1 << 16)
    except UnicodeError:
        return False


def _read_text(path: Path) -> str:
    """Raises LayerwiseError for a file that is not UTF-8, whose text would be garbage."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise UnicodeError("it holds NUL characters")
        return text
    except OSError as error:
        raise LayerwiseError(f"data.paths: {path}: {error.strerror}") from None
    except UnicodeError as error:
        raise LayerwiseError(f"data.paths: {path} is not UTF-8 text ({error}): convert it, as iconv does") from None


def _dataset(config: DataConfig) -> Callable[[], Iterator[str]]:
    if not config.dataset:
        raise LayerwiseError("data.dataset is not given: name the dataset of data.source=dataset")
    import datasets

    try:
        loaded: Any = datasets.load_dataset(config.dataset, config.dataset_config, split=config.dataset_split)
    except Exception as error:  # the library raises many kinds, network errors among them
        raise LayerwiseError(f"data.dataset={config.dataset!r} cannot be loaded: {error!s:.300}") from None
    if config.text_column not in loaded.column_names:
        columns = ", ".join(loaded.column_names)
        raise LayerwiseError(f"data.text_column={config.text_column!r}: the dataset has columns {columns}")
    column = loaded.select_columns(config.text_column)
    return lambda: (str(row[config.text_column]) for row in column)
