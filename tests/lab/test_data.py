from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import TEXT, tiny_config

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import DataConfig
from layerwise.lab.data.batches import Sampler, TextData
from layerwise.lab.data.tokens import Corpus, byte_ids, cache_folder, load_tokens, read_corpus, split


@given(
    length=st.integers(20, 400),
    seq_len=st.integers(1, 16),
    seed=st.integers(0, 2**32 - 1),
    passes=st.integers(1, 3),
)
def test_a_pass_takes_each_sequence_once_and_stays_in_the_text(length: int, seq_len: int, seed: int, passes: int) -> None:
    sampler = Sampler(np.arange(length, dtype=np.uint16), seq_len, seed)
    assert sampler.sequences == (length - seq_len) // seq_len
    for number in range(passes if sampler.sequences else 0):
        starts = np.sort(sampler.starts(number * sampler.sequences, sampler.sequences))
        assert starts[0] >= 0
        assert starts[-1] + seq_len + 1 <= length  # with the next token of the last one
        assert np.all(np.diff(starts) == seq_len)


@given(seed=st.integers(0, 1000), first=st.integers(0, 200), count=st.integers(1, 60), cut=st.integers(0, 60))
def test_a_position_does_not_depend_on_how_it_was_reached(seed: int, first: int, count: int, cut: int) -> None:
    ids = np.arange(333, dtype=np.uint16)
    whole = Sampler(ids, 7, seed).starts(first, count)
    cut = min(cut, count)
    fresh = Sampler(ids, 7, seed)
    later = fresh.starts(first + cut, count - cut)  # asked for in the other order
    assert np.array_equal(whole, np.concatenate([fresh.starts(first, cut), later]))


def test_batches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    first, again = TextData(tiny_config(tmp_path)), TextData(tiny_config(tmp_path, optimizer__name="lanton"))
    other = TextData(tiny_config(tmp_path, training__seed=1))
    again.batch(7)
    assert torch.equal(first.batch(3).inputs, again.batch(3).inputs)
    assert not torch.equal(first.batch(3).inputs, first.batch(4).inputs)
    assert not torch.equal(first.batch(3).inputs, other.batch(3).inputs)


def test_targets_are_the_next_tokens_of_the_text(tmp_path: Path) -> None:
    batch = TextData(tiny_config(tmp_path)).batch(0)
    assert batch.inputs.shape == batch.targets.shape == (4, 16)
    assert batch.inputs.dtype == torch.int64
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    for row, last in zip(batch.inputs.tolist(), batch.targets[:, -1].tolist(), strict=True):
        assert bytes([*row, last]).decode() in TEXT
    parts = batch.split(2)
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)


def test_validation_is_fixed_and_held_out(tmp_path: Path) -> None:
    data = TextData(tiny_config(tmp_path))
    seen = [batch.inputs for batch in data.validation(3)]
    assert sum(len(inputs) for inputs in seen) == 8  # eval_batches=2 of batch_size=4
    assert [len(inputs) for inputs in seen] == [3, 3, 2]
    assert torch.equal(torch.cat(seen), torch.cat([b.inputs for b in data.validation(4)]))
    assert data.info["train_tokens"] + data.info["validation_tokens"] == len(TEXT) + 2  # each piece has an end


@given(
    documents=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=60),
    fraction=st.sampled_from([0.05, 0.1, 0.3, 0.5]),
)
def test_splitting_loses_nothing(documents: list[str], fraction: float) -> None:
    corpus = Corpus.of("test", lambda: iter(documents))
    pieces = list(split(corpus, fraction))
    assert "".join(text for text, _ in pieces) == "".join(documents)
    held_out = sum(len(text) for text, out in pieces if out)
    if corpus.count < 2 * round(1 / fraction):  # cut by characters: exact to one
        assert abs(held_out - fraction * corpus.characters) <= 1
    else:
        assert sum(out for _, out in pieces) >= 2


def test_the_hash_sees_boundaries_and_order() -> None:
    hashes = {
        Corpus.of("test", lambda texts=texts: iter(texts)).sha256
        for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"])
    }
    assert len(hashes) == 4


def test_bytes_round_trip() -> None:
    ids = byte_ids(["héllo", ""])
    assert bytes(ids[0][:-1].tolist()).decode() == "héllo"
    assert [int(row[-1]) for row in ids] == [256, 256]


def test_the_built_in_text_is_the_same_each_time_and_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(tokenizer="byte")  # quicker than a BPE of nine million characters
    first = load_tokens(config)
    assert first.info["sha256"] == read_corpus(config).sha256
    assert first.info["train_tokens"] > 1_000_000
    assert 0.02 < first.info["validation_tokens"] / first.info["train_tokens"] < 0.1
    assert int(first.train.max()) == 256
    monkeypatch.setattr("layerwise.lab.data.tokens._tokenise", lambda *_: pytest.fail("tokenised again"))
    again = load_tokens(config)
    assert np.array_equal(first.train, again.train)
    assert [path.name for path in cache_folder().iterdir() if "." in path.name] == []  # no work folder left


def test_bpe_decodes_to_the_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    config = tiny_config(tmp_path, data__tokenizer="bpe", data__vocab_size=280).data
    tokens = load_tokens(config)
    tokenizer = Tokenizer.from_file(str(next(cache_folder().glob("tokens-*")) / "tokenizer.json"))
    text = tokenizer.decode(tokens.train.tolist(), skip_special_tokens=True)
    assert TEXT.startswith(text)
    assert len(text) == round(0.95 * len(TEXT))


@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_a_file_of_token_ids(tmp_path: Path, suffix: str) -> None:
    ids = np.arange(1000, dtype=np.uint16) % 50
    path = tmp_path / f"ids.{suffix}"
    if suffix == "npy":
        np.save(path, ids)
    else:
        ids.tofile(path)
    tokens = load_tokens(DataConfig(source="tokens", paths=[str(path)], validation_fraction=0.1))
    assert np.array_equal(tokens.train, ids[:900])
    assert np.array_equal(tokens.validation, ids[900:])
    assert tokens.vocab_size == 50


def test_folders_take_text_files_in_order_and_leave_others(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("second")
    (folder / "a.txt").write_text("first é")
    (folder / "sub" / "c.md").write_text("third")
    (folder / ".hidden").write_text("no")
    (folder / "image.png").write_bytes(b"\x89PNG\0\0\xff\xfe")
    corpus = read_corpus(DataConfig(source="files", paths=[str(folder)]))
    assert list(corpus.documents()) == ["first é", "second", "third"]


def test_a_local_dataset(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    config = DataConfig(source="dataset", dataset=str(tmp_path))
    assert list(read_corpus(config).documents()) == ["one", "two"]
    with pytest.raises(LayerwiseError, match="columns text"):
        read_corpus(config.model_copy(update={"text_column": "body"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training__batch_size": 2000}, "one batch of training.batch_size=2000"),
        ({"data__seq_len": 5000}, "give more text"),
        ({"data__validation_fraction": 0.001}, "raise data.validation_fraction"),
        ({"data__paths": []}, "data.paths is empty"),
        ({"data__paths": ["nowhere.txt"]}, "nowhere.txt: no such file"),
        ({"data__vocab_size": 300}, "bytes have 257"),
        ({"data__tokenizer": "bpe", "data__vocab_size": 100}, "at least 257"),
        ({"data__source": "tokens"}, "one .npy or .bin file"),
        ({"data__source": "tokens", "data__paths": ["none.npy"]}, "No such file"),
        ({"data__source": "dataset", "data__paths": []}, "data.dataset is not given"),
    ],
)
def test_bad_data_is_one_line(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(LayerwiseError, match=words):
        TextData(tiny_config(tmp_path, **changes))


def test_files_of_ids_that_are_none(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.ones(5))
    with pytest.raises(LayerwiseError, match="float64"):
        load_tokens(DataConfig(source="tokens", paths=[str(tmp_path / "float.npy")]))
    np.save(tmp_path / "ids.npy", np.arange(5))
    with pytest.raises(LayerwiseError, match="ids from 0 to 4"):
        load_tokens(DataConfig(source="tokens", paths=[str(tmp_path / "ids.npy")], vocab_size=3))
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(LayerwiseError, match="cannot be read as token ids"):
        load_tokens(DataConfig(source="tokens", paths=[str(tmp_path / "odd.bin")]))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(LayerwiseError, match="holds no text"):
        load_tokens(DataConfig(source="files", paths=[str(tmp_path / "empty.txt")]))


def test_two_processes_can_fill_the_cache_at_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    code = (
        "from layerwise.lab.config.schema import DataConfig; from layerwise.lab.data.tokens import load_tokens;"
        f"t = load_tokens(DataConfig(source='files', paths=[{str(tmp_path / 'text.txt')!r}], vocab_size=280));"
        "print(int(t.train.sum()))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {process.communicate()[0].strip() for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(sums) == 1
