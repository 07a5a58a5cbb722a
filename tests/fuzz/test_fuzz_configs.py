"""Any words and any YAML give a config that means what was written, or one line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from cases import Share, cases, one_line, run
from hypothesis import assume
from hypothesis import strategies as st

from layerwise.errors import LayerwiseError
from layerwise.lab.config.keys import SHORTHANDS, flatten
from layerwise.lab.config.load import load_config
from layerwise.lab.config.schema import ModelConfig
from layerwise.lab.experiments.contenders import CompareConfig, entries
from layerwise.lab.experiments.sweep.run_sweep import SweepConfig, make_plan
from layerwise.lab.models.families import PRESETS, build_model, logits
from layerwise.lab.models.family import FAMILIES, Examples
from layerwise.lab.optimizers.registry import optimizers
from layerwise.lab.training.run import complete

KEYS = [
    f"{name}.{key}" for name, section in SweepConfig.model_fields.items() for key in section.annotation.model_fields  # type: ignore[union-attr]
]  # fmt: skip
FURTHER = ["n_layer", "n_head", "n_embd", "hidden_size", "width", "norm", "resid_pdrop", "n_inner"]
SETTINGS = [
    *(f"model.{key}" for key in FURTHER),
    *(f"optimizer.{key}" for key in sorted({k for preset in optimizers().values() for k in preset.keywords()})),
    *(f"optimizer.rates.{key}" for key in ("rule", "alpha", "beta2", "floor", "reference", "size_normalised")),
    "optimizer.rates.multipliers",
]  # fmt: skip
WORDS = [
    "off",
    "no",
    "on",
    "yes",
    "abc",
    "",
    "true",
    "null",
    "~",
    "1e300",
    "-1",
    "1e20",
    ".nan",
    ".inf",
    "-0.0",
    "0",
    "1",
]
values = st.one_of(
    st.sampled_from([*WORDS, *PRESETS, *optimizers()]),
    st.integers(-(10**6), 10**6).map(str),
    st.floats().map(str),
    st.text(max_size=12),
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ).map(json.dumps),
)
keys = st.one_of(
    st.sampled_from([*KEYS, *SETTINGS, *SHORTHANDS, "model.lora.rank", "model.lora.targets"]),
    st.text(max_size=20),
)
overrides = st.lists(st.tuples(keys, values).map("=".join), min_size=1, max_size=3)


def check(overrides: list[str]) -> None:
    for schema, use in ((SweepConfig, make_plan), (CompareConfig, entries)):
        try:
            config: Any = load_config(None, overrides, schema)
            complete(config)
            use(config)
        except LayerwiseError as error:
            one_line(error)


@cases(short=60, long=4000)
def test_any_words(share: Share) -> None:
    run(share, check, overrides=overrides)


def means_what_was_written(key: str, value: Any) -> None:
    """A value that was accepted stands in the config as it was given: nothing was dropped or turned into another."""
    try:
        config = complete(load_config(None, [f"{key}={json.dumps(value)}"]))
    except LayerwiseError as error:
        one_line(error)
        return
    assume(not isinstance(value, dict) and value is not None)
    name = f"{key}.{SHORTHANDS[key]}" if key in SHORTHANDS else key
    found = flatten(config.model_dump())
    if name == "optimizer.rates.rule":
        return  # under the rule's own defaults
    assert name in found, (key, value)
    stands = found[name]
    assert list(stands) == list(value) if isinstance(value, list) else stands == value, (key, value, stands)
    assert isinstance(value, bool) == isinstance(stands, bool), (key, value, stands)


@cases(short=60, long=3000)
def test_what_is_accepted_stands_as_it_was_written(share: Share) -> None:
    plain = st.booleans() | st.integers(-3, 400) | st.floats(0, 2) | st.sampled_from(["off", "abc", "lanton", "wsd", "bf16"])
    taken = [key for key in [*KEYS, *SETTINGS] if not key.startswith("sweep.")]
    run(share, means_what_was_written, key=st.sampled_from(taken), value=plain | st.lists(plain, max_size=2))


def any_file(folder: Path, content: bytes) -> None:
    file = folder / "config.yaml"
    file.write_bytes(content)
    try:
        complete(load_config(file))
    except LayerwiseError as error:
        one_line(error)


@cases(short=60, long=3000)
def test_any_file(tmp_path: Path, share: Share) -> None:
    pieces = st.sampled_from([
        b"model: ", b"optimizer:\n  lr: ", b"training: {steps: 3}\n", b"&a ", b"*a", b"[", b"{",
        b"!!python/object:os.system ",
        b"<<: ", b"---\n", b"\t", b"- ", b"? ", b"| \n", b"'", b'"', b"\xff\xfe", b"1e3", b"lanton",
        b"!!binary abc", b"!!set {a}",
    ])  # fmt: skip
    run(
        share,
        any_file,
        folder=st.just(tmp_path),
        content=st.lists(pieces | st.binary(max_size=6), max_size=8).map(b"".join),
    )


SMALL = {
    "gpt2": {"n_layer": 1, "n_embd": 8, "n_head": 2},
    "llama": {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2},
    "decoder": {"base_width": 8, "base_heads": 2, "base_blocks": 1},
}


def check_model(family: str, settings: dict[str, Any], lora: int | None) -> None:
    """Settings make a model that computes, or one line."""
    tree = {"family": family, "preset": None, **SMALL[family], **settings}
    try:
        config = ModelConfig.model_validate({**tree, "lora": None if lora is None else {"rank": lora}})
        model = build_model(config, Examples(vocab_size=11, seq_len=4), seed=0)
    except LayerwiseError as error:
        one_line(error)
        return
    assert logits(model, torch.zeros(2, 4, dtype=torch.long)).shape == (2, 4, 11)


@cases(short=30, long=1500)
def test_any_settings_of_a_model(share: Share) -> None:
    families = {name: sorted(FAMILIES[name].setting_defaults()) for name in SMALL}
    value = st.integers(-2, 12) | st.booleans() | st.sampled_from([0.0, -1.0, 0.02, 2.0, "gelu", "abc", None, [], {}])
    drawn = st.sampled_from(sorted(families)).flatmap(
        lambda name: st.tuples(
            st.just(name), st.dictionaries(st.sampled_from(families[name]), value, min_size=1, max_size=2)
        )
    )
    run(
        share, lambda drawn, lora: check_model(*drawn, lora), drawn=drawn, lora=st.sampled_from([None, None, 1, 10**6]),
    )  # fmt: skip
