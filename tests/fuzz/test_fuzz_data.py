"""Any file as text or as token ids, and any cache: the ids of what is there, or one line."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from cases import Share, cases, one_line, run
from hypothesis import strategies as st

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import DataConfig
from layerwise.lab.data.tokens import load_tokens


def decoded(files: object) -> bytes:
    ids = np.concatenate([files.train, files.validation])  # type: ignore[attr-defined]
    return bytes(ids[ids < 256].astype(np.uint8))


def text(folder: Path, content: bytes) -> None:
    """Bytes are read as the text they are, in full, or not at all."""
    file = folder / "text.txt"
    file.write_bytes(content)
    try:
        files = load_tokens(DataConfig(source="files", paths=[str(file)], tokenizer="byte"))
    except LayerwiseError as error:
        one_line(error)
        return
    wanted = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    assert decoded(files) == wanted.encode("utf-8", errors="replace")


@cases(short=40, long=2000)
def test_any_text(tmp_path: Path, share: Share) -> None:
    words = st.text(max_size=30)
    content = st.one_of(
        st.binary(max_size=40), words.map(lambda t: t.encode("utf-8", "replace")),
        words.map(lambda t: t.encode("utf-16", "replace")), words.map(lambda t: t.encode("utf-32", "replace")),
        words.map(lambda t: t.encode("latin-1", "replace")), words.map(lambda t: t.encode("utf-8-sig", "replace")),
    )  # fmt: skip
    run(share, text, folder=st.just(tmp_path), content=content)


def ids(folder: Path, suffix: str, content: bytes, dtype: str) -> None:
    file = folder / f"ids{suffix}"
    file.write_bytes(content)
    try:
        files = load_tokens(DataConfig(source="tokens", paths=[str(file)], token_dtype=dtype))  # type: ignore[arg-type]
    except LayerwiseError as error:
        one_line(error)
        return
    assert max(files.train.max(initial=0), files.validation.max(initial=0)) < files.vocab_size


@cases(short=40, long=1000)
def test_any_file_of_ids(tmp_path: Path, share: Share) -> None:
    array = st.sampled_from(["uint16", "int64", "float32", "object"]).flatmap(
        lambda dtype: st.lists(st.integers(0, 9), max_size=9).map(lambda numbers: _npy(np.array(numbers, dtype=dtype)))
    )
    cut = st.tuples(array, st.integers(0, 200)).map(lambda pair: pair[0][: pair[1]])
    run(
        share, ids, folder=st.just(tmp_path), suffix=st.sampled_from([".npy", ".bin"]),
        content=st.binary(max_size=40) | array | cut, dtype=st.sampled_from(["uint16", "uint32"]),
    )  # fmt: skip


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def cache(folder: Path, file: str, content: bytes) -> None:
    """Whatever lies in the cache, the ids are those of the text."""
    source = folder / "text.txt"
    source.write_text("a text that is cached\n" * 8)
    config = DataConfig(source="files", paths=[str(source)], tokenizer="byte")
    whole = decoded(load_tokens(config))
    [found] = (folder / "cache").glob("tokens-*")
    (found / file).write_bytes(content)
    assert decoded(load_tokens(config)) == whole


@cases(short=20, long=1000)
def test_any_cache(tmp_path: Path, share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    names = st.sampled_from(["train.bin", "validation.bin", "info.json"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = st.binary(max_size=40) | st.sampled_from([b"{}", b'{"files": {}}', b"[]", b"null", b'{"files": 3}'])
        run(share, cache, folder=st.just(tmp_path), file=names, content=content)
