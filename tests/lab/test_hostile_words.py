"""Words and values that mean nothing, or not what they seem: one line, before anything is trained or replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import tiny_tree

from layerwise.errors import LayerwiseError
from layerwise.lab.config.load import load_config, parse_yaml
from layerwise.lab.experiments.comparison import compare
from layerwise.lab.experiments.contenders import CompareConfig
from layerwise.lab.experiments.sweep.run_sweep import SweepConfig, make_plan
from layerwise.lab.training.run import complete, train

# ------------------------------------------------------------------ words on the command line


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["optimizer.lr=5e-2", "optimizer=lanton"], "optimizer.lr", 5e-2),
        (["schedule.final_fraction=0.5", "schedule=wsd"], "schedule.final_fraction", 0.5),
        (["data.seq_len=7", "data=digits"], "data.seq_len", 7),
        (["model.attention=eager", "model=llama-tiny"], "model.attention", "eager"),
        (["parallel.timeout=9", "parallel=fsdp2"], "parallel.timeout", 9.0),
        (["optimizer=lanton", "optimizer.rates.alpha=0.5", "optimizer.rates=noise_adaptive"], "optimizer.rates.alpha", 0.5),
    ],
)  # fmt: skip
def test_a_word_for_a_section_keeps_what_was_set(tmp_path: Path, overrides: list[str], key: str, value: object) -> None:
    found: Any = complete(load_config(None, overrides)).model_dump()
    for part in key.split("."):
        found = found[part]
    assert found == value


def test_a_key_that_then_belongs_to_no_one_is_named() -> None:
    with pytest.raises(LayerwiseError, match=r"`optimizer\.momentum` of adamw"):
        complete(load_config(None, ["optimizer=muon", "optimizer.momentum=0.9", "optimizer=adamw"]))
    with pytest.raises(LayerwiseError, match=r"`model\.n_layer`"):
        complete(load_config(None, ["model.n_layer=2", "model=llama-tiny"]))


def test_a_mapping_for_a_section_keeps_what_it_does_not_name(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optimizer: {name: adamw, weight_decay: 0.3, role_factors: {head: 2}}\nmodel: gpt2-tiny\n")
    overrides = ["optimizer={name: lanton}", "optimizer.role_factors={embedding: 3}", "model={n_layer: 2}"]
    config = complete(load_config(file, [*overrides, "optimizer={}"]))
    assert (config.optimizer.name, config.optimizer.weight_decay) == ("lanton", 0.3)
    assert config.optimizer.role_factors == {"embedding": 3}  # a key of its own
    assert (config.model.preset, config.model.settings) == ("gpt2-tiny", {"n_layer": 2})


def test_an_empty_mapping_for_a_section_is_the_section_at_its_defaults() -> None:
    config = load_config(None, ["model.lora={}", "optimizer=muon", "optimizer.rates={}"])
    assert config.model.lora is not None
    assert config.model.lora.rank == 8
    assert config.optimizer.rates == {}
    assert load_config(None, ["model.lora.rank=4", "model.lora={}"]).model.lora.rank == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.amsgrad=off", "optimizer.fused=abc", "optimizer.betas={}", "optimizer.eps=true", "optimizer.eps=.nan",
        "training.steps=true", "training.clip_norm=true", "optimizer.lr=1e300", "optimizer.lr=true", "model.n_layer=true",
        "model.n_layer=-1", "model.n_head=-1", "model.n_layer=1e20", "model.n_layer=100000000000", "model.resid_pdrop=off",
        "model.n_layer=20000", "run.name=../../evil", "run.name=a/b", "run.name=..", 'run.name="a\\nb"', "run.dir=\"a\\0\"",
        f"run.name={'x' * 300}", "run.tensorboard=off", "training.steps=1" + "0" * 5000,
        "function_space.probes=100000000", "model.lora.rank=1000000000",
    ],
)  # fmt: skip
def test_what_no_key_can_mean_is_refused_in_one_line(override: str) -> None:
    with pytest.raises(LayerwiseError) as said:
        complete(load_config(None, [override]))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("override", ["optimizer.rates.size_normalised=no", "optimizer.nesterov=no"])
def test_words_are_no_truths_for_rules_either(override: str) -> None:
    name = "lanton" if "rates" in override else "muon"
    with pytest.raises(LayerwiseError, match="give True or False"):
        complete(load_config(None, [f"optimizer={name}", override]))


def test_a_short_file_is_not_an_endless_one(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for one, other in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{other}: &{other} [{', '.join([f'*{one}'] * 9)}]\n"
    for text, words in ((bomb, "more than"), ("a: &a [*a]", "more than"), ("[" * 5000, "not valid YAML")):
        file = tmp_path / "bomb.yaml"
        file.write_text(text)
        with pytest.raises(LayerwiseError, match=words):
            load_config(file)
    assert parse_yaml("[1, [2]]", "test") == [1, [2]]


def test_a_grid_of_a_billion_rates_is_refused() -> None:
    with pytest.raises(LayerwiseError, match="a grid is a list of rates"):
        load_config(None, ["sweep.lr={low: 1e-4, high: 1e-1, count: 1e9}"], SweepConfig)


@pytest.mark.parametrize("key", ["seeds", "trials"])
def test_a_billion_runs_are_refused(key: str) -> None:
    with pytest.raises(LayerwiseError, match=rf"compare\.{key}=1000000000: input should be less than"):
        load_config(None, [f"compare.{key}=1000000000"], CompareConfig)


def test_wrong_rates_are_named_with_their_key() -> None:
    with pytest.raises(LayerwiseError, match=r"sweep\.lr=\{'low': 0.*a grid is a list of rates"):
        load_config(None, ["sweep.lr={low: 0, high: 1, count: 3}"], SweepConfig)
    with pytest.raises(LayerwiseError, match=r"compare\.lr_grid\.adamw\.1='yes': input should be a valid number"):
        load_config(None, ["compare.lr_grid.adamw=[1e-3, yes]"], CompareConfig)


@pytest.mark.parametrize("override", ["model.head_dim=3", "model.num_key_value_heads=3", "model.hidden_act=xx"])
def test_a_model_that_cannot_compute_is_found_before_an_older_run_is_replaced(tmp_path: Path, override: str) -> None:
    """Found by hand: it was a traceback at the first batch, when the older run's checkpoints had been deleted."""
    tree = tiny_tree(tmp_path)
    tree["model"] = {
        "preset": "llama-tiny",
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
    }
    tree["run"]["name"] = "a"
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    path = train(load_config(file)).path
    before = sorted(path.rglob("*"))
    with pytest.raises(LayerwiseError, match=override.partition(".")[2].partition("=")[0]):
        train(load_config(file, [override]), overwrite=True)
    assert sorted(path.rglob("*")) == before


def test_heads_that_do_not_share_a_width_are_one_line() -> None:
    with pytest.raises(LayerwiseError, match="a width of 128 is not a multiple of 148 heads"):
        make_plan(load_config(None, ["model.n_head=148"], SweepConfig))


# ------------------------------------------------------------------ before anything is trained


@pytest.mark.parametrize(
    "contender", ["{name: adamw, betas: [2, 2]}", "{name: adamw, role_factors: {conv: 2}}", "{name: adamw, eps: -1}"]
)  # fmt: skip
def test_a_contender_that_cannot_be_built_ends_a_comparison_before_it_begins(tmp_path: Path, contender: str) -> None:
    tree = tiny_tree(tmp_path)
    tree["compare"] = {"optimizers": ["lanton", "bad"], "contenders": {"bad": yaml.safe_load(contender)}}
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(LayerwiseError):
        compare(load_config(file, schema=CompareConfig))
    assert not list((tmp_path / "runs").rglob("run.json"))


def test_a_contender_cannot_write_outside(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    tree["compare"] = {"contenders": {"../../evil": {"name": "adamw"}}}
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(LayerwiseError, match="without slashes"):
        compare(load_config(file, schema=CompareConfig))
