"""Where text comes from, an ordered set of documents with a hash, and its token ids on disk: byte or BPE ids, split into
training and validation, cached by content.

The cache is a folder per (text, tokenizer, split), in `$LAYERWISE_CACHE` or `~/.cache/layerwise`. It is
written beside its final place and moved there: a killed or concurrent process never leaves half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from layerwise.errors import LayerwiseError, warn
from layerwise.lab.config.identity import hashed
from layerwise.lab.config.schema import DataConfig

Ids = npt.NDArray[Any]  # one dimension, uint16 or uint32, usually a memory map

DEFAULT_BPE_VOCABULARY = 2048
BYTES = 257  # ids: 256 bytes and the end of a document
_BPE_SAMPLE = 100_000_000  # characters of training text a BPE is trained on
_END = "<|end|>"
_VERSION = 2  # of the cache's contents
PARTS = ("train.bin", "validation.bin")
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


def byte_ids(documents: list[str]) -> list[Ids]:
    """Documents as UTF-8 bytes, each closed by 256."""
    texts = (document.encode("utf-8", errors="replace") for document in documents)
    return [np.append(np.frombuffer(text, np.uint8), np.uint16(256)) for text in texts]


def trained_bpe(documents: Iterator[str], vocab_size: int) -> Any:
    """A byte-level BPE of the tokenizers library: the same text and size always give the same one."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents, vocab_size, min_frequency=0, show_progress=False, special_tokens=[_END])
    return tokenizer


def bpe_ids(tokenizer: Any, documents: list[str]) -> list[Ids]:
    """Documents as ids of a BPE, each closed by 0."""
    encodings = tokenizer.encode_batch(documents, add_special_tokens=False)
    return [np.array([*encoding.ids, 0], np.uint32) for encoding in encodings]


@dataclass(frozen=True)
class TokenFiles:
    """Training and validation ids, the vocabulary's size, and what the record of a run says of the text."""

    train: Ids
    validation: Ids
    vocab_size: int
    info: dict[str, Any]


def load_tokens(config: DataConfig) -> TokenFiles:
    """The token ids of a config's text, from the cache where it has them. Raises LayerwiseError."""
    if config.source == "tokens":
        return _from_id_file(config)
    corpus = read_corpus(config)
    folder, info = _cached(config, corpus)
    train, validation = (_open_ids(folder / name, info["dtype"]) for name in info.pop("files"))
    return TokenFiles(train, validation, info["vocab_size"], {"source": config.source, "name": corpus.name, **info})


def _open_ids(path: Path, dtype: str) -> Ids:
    if path.stat().st_size == 0:  # cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def cache_folder() -> Path:
    """`$LAYERWISE_CACHE`, or `~/.cache/layerwise`."""
    return Path(os.environ.get("LAYERWISE_CACHE") or "~/.cache/layerwise").expanduser()


def _cached(config: DataConfig, corpus: Corpus) -> tuple[Path, dict[str, Any]]:
    """The folder with this corpus's ids, made first where it is missing, and what it says of itself."""
    vocab_size = _vocabulary(config)
    identity = [_VERSION, corpus.sha256, config.tokenizer, vocab_size, config.validation_fraction]
    folder = cache_folder() / f"tokens-{hashed(identity)[:24]}"
    if folder.exists():
        if (known := _read_info(folder)) is not None:
            return folder, known
        warn(f"cache folder {folder} is damaged: its token ids are made again")
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise LayerwiseError(
            f"cache folder {folder.parent}: {error.strerror}; set LAYERWISE_CACHE to one that can be written"
        ) from None
    with made as name:
        work = Path(name)
        info = _tokenise(config, corpus, vocab_size, work)
        info["files"] = {part: _written(work / part) for part in PARTS}
        (work / "info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
        try:
            work.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same contents
                raise
    return folder, info


def _read_info(folder: Path) -> dict[str, Any] | None:
    """What info.json says of a cached text; None where the files beside it are not those that were written."""
    try:
        info: dict[str, Any] = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        good = info["files"] == {name: _written(folder / name) for name in PARTS}
        return info if good and info["dtype"] in ("uint16", "uint32") and info["vocab_size"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _written(file: Path) -> list[Any]:
    return [file.stat().st_size, _file_hash(file)]


def _vocabulary(config: DataConfig) -> int:
    if config.tokenizer == "byte":
        if config.vocab_size not in (None, BYTES):
            raise LayerwiseError(f"data.vocab_size={config.vocab_size}: bytes have 257 ids; leave it out")
        return BYTES
    vocab_size = config.vocab_size or DEFAULT_BPE_VOCABULARY
    if vocab_size < BYTES:
        raise LayerwiseError(f"data.vocab_size={vocab_size}: BPE needs at least 257 (256 bytes and the end)")
    return vocab_size


def _tokenise(config: DataConfig, corpus: Corpus, vocab_size: int, folder: Path) -> dict[str, Any]:
    encode: Callable[[list[str]], list[Ids]] = byte_ids
    if config.tokenizer == "bpe":
        training = (text for text, held_out in split(corpus, config.validation_fraction) if not held_out)
        tokenizer = trained_bpe(_head(training, _BPE_SAMPLE), vocab_size)
        tokenizer.save(str(folder / "tokenizer.json"))
        encode, vocab_size = partial(bpe_ids, tokenizer), tokenizer.get_vocab_size()
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    counts, text_bytes = [0, 0], 0
    with open(folder / PARTS[0], "wb") as train, open(folder / PARTS[1], "wb") as validation:
        pieces = split(corpus, config.validation_fraction)
        while chunk := list(islice(pieces, 64)):
            encoded = encode([text for text, _ in chunk])
            for (text, held_out), ids in zip(chunk, encoded, strict=True):
                (validation if held_out else train).write(ids.astype(dtype).tobytes())
                counts[held_out] += len(ids)
                text_bytes += len(text.encode("utf-8", errors="replace"))
    return {
        "sha256": corpus.sha256,
        "documents": corpus.count,
        "bytes": text_bytes,
        "tokenizer": config.tokenizer,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "train_tokens": counts[0],
        "validation_tokens": counts[1],
        "bytes_per_token": text_bytes / max(1, sum(counts)),
    }


def _head(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def split(corpus: Corpus, fraction: float) -> Iterator[tuple[str, bool]]:
    """Pieces of text, each with whether it is held out.

    Every n-th document is, n = 1 / fraction, so that training and validation text are of one kind. Where
    documents are too few for that, the last `fraction` of the characters is.
    """
    every = max(2, round(1 / fraction))
    if corpus.count >= 2 * every:
        for index, document in enumerate(corpus.documents()):
            yield document, index % every == every // 2
        return
    boundary = round((1 - fraction) * corpus.characters)
    for document in corpus.documents():
        kept = max(0, min(len(document), boundary))
        if kept:
            yield document[:kept], False
        if kept < len(document):
            yield document[kept:], True
        boundary -= len(document)


def _from_id_file(config: DataConfig) -> TokenFiles:
    """A .npy array or a raw .bin file; its last `validation_fraction` is held out."""
    if len(config.paths) != 1 or not config.paths[0].endswith((".npy", ".bin")):
        raise LayerwiseError(f"data.paths={config.paths}: data.source=tokens takes one .npy or .bin file")
    path = Path(config.paths[0]).expanduser()
    try:
        ids = np.load(path, mmap_mode="r") if path.suffix == ".npy" else _open_ids(path, config.token_dtype)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise LayerwiseError(f"data.paths: {path} cannot be read as token ids: {error}") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.size == 0:
        raise LayerwiseError(f"data.paths: {path} holds {ids.dtype} of shape {ids.shape}; needed: a row of integers")
    smallest, largest = int(ids.min()), int(ids.max())
    vocab_size = config.vocab_size or largest + 1
    if smallest < 0 or largest >= vocab_size:
        raise LayerwiseError(f"data.vocab_size={vocab_size}: {path} holds ids from {smallest} to {largest}")
    boundary = round((1 - config.validation_fraction) * ids.size)
    info = {
        "source": "tokens",
        "name": path.name,
        "sha256": _file_hash(path),
        "tokenizer": None,
        "vocab_size": vocab_size,
        "dtype": str(ids.dtype),
        "train_tokens": boundary,
        "validation_tokens": int(ids.size) - boundary,
    }
    return TokenFiles(ids[:boundary], ids[boundary:], vocab_size, info)


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
