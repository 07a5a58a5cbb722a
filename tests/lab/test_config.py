from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from layerwise.errors import LayerwiseError
from layerwise.lab.config.load import load_config, parse_yaml
from layerwise.lab.config.schema import Config
from layerwise.lab.optimizers.registry import base_rates
from layerwise.lab.training.run import complete

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_built_in_run_needs_no_file() -> None:
    config = load_config()
    assert config == Config()
    assert (config.model.preset, config.optimizer.name, config.run_name) == (
        "gpt2-tiny",
        "adamw",
        "gpt2-tiny-adamw",
    )
    assert config.training.steps == 300


def test_a_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optimizer: muon\ntraining:\n  precision: no\n  steps: 7\nmodel: {n_layer: 3}\n")
    config = load_config(file, ["optimizer.lr=1e-3", "model.n_embd=64", "training.steps=9", "optimizer.rates=static"])
    assert config.optimizer.name == "muon"
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.rates == {"rule": "static"}
    assert config.model.settings == {"n_layer": 3, "n_embd": 64}
    assert config.training.precision == "no"  # YAML 1.1 would read `no` as false
    assert config.training.steps == 9


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("2.5", 2.5), (".5", 0.5), ("-1E4", -1e4), ("12", 12), ("no", "no"), ("on", "on"),
        ("true", True), ("null", None), ("[1, 2e0]", [1, 2.0]), ("2026-01-01", "2026-01-01"), ("e3", "e3"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimzer=lanton", ["`optimzer`", "`optimizer`"]),
        ("training.stps=3", ["`training.stps`", "`steps`"]),
        ("lr=1e-3", ["unknown key `lr`: did you mean `optimizer.lr`?"]),
        ("training.warmup_steps=4", ["unknown key `training.warmup_steps`: did you mean `schedule.warmup_steps`?"]),
        ("data.batch_size=4", ["unknown key `data.batch_size`: did you mean `training.batch_size`?"]),
        ("data.block_size=4", ["unknown key `data.block_size`: did you mean `seq_len`?"]),
        ("optimizer.lerning_rate=1", ["unknown key `optimizer.lerning_rate` of adamw: did you mean `lr`?"]),
        ("name=a", ["`optimizer.name` or `schedule.name` or `run.name`"]),
        ("model.n_layr=3", ["`model.n_layr`", "`n_layer`"]),
        ("model.preset=gpt2-tny", ["gpt2-tny", "`gpt2-tiny`"]),
        ("model.family=gpt2", ["model.preset=null"]),
        ("optimizer=lantn", ["lantn", "`lanton`"]),
        ("optimizer.mometum=0.9", ["`optimizer.mometum`"]),
        ("training.steps=0", ["training.steps=0", "greater than or equal to 1"]),
        ("training.precision=int8", ["training.precision='int8'", "'bf16'"]),
        ("training.batch_size=1.5", ["training.batch_size=1.5"]),
        ("optimizer.lr=nan", ["optimizer.lr='nan'"]),
        ("optimizer.lr=.nan", ["optimizer.lr=nan"]),
        ("optimizer.rates=noise_adaptive", ["adamw has no layer rates"]),
        ("training.accumulation=3", ["training.batch_size=16", "training.accumulation=3"]),
        ("training", ["key=value"]),
        ("=3", ["key=value"]),
        ("run.name.x=3", ["run.name"]),
        ("data=[", ["not valid YAML"]),
        ("training=3", ["training=3"]),
        ("data.paths=[my.txt]", ["data.paths=['my.txt']", "data.source=builtin", "files"]),
        ("data.paths=my.txt", ["data.paths=['my.txt']", "data.source=builtin", "files"]),
        ("data={source: digits, paths: [a]}", ["data.paths=['a']", "data.source=digits"]),
        ("data={source: fashion-mnist, paths: [a, b]}", ["data.paths=['a', 'b']", "one folder"]),
        ("data.dataset=imdb", ["data.dataset=imdb", "data.source=dataset"]),
        (
            "data={source: files, paths: [a], dataset_config: b}",
            ["data.dataset_config=b", "data.source=files"],
        ),
        ("run.name=1", ["run.name=1", "'run.name=\"1\"'"]),
    ],
)
def test_a_wrong_override_is_one_line_with_the_mend(override: str, words: list[str]) -> None:
    with pytest.raises(LayerwiseError) as caught:
        complete(load_config(None, [override]))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.rates.rule=noise", ["noise_adaptive"]),
        ("optimizer.rates.alfa=1", ["`optimizer.rates.alfa`", "`alpha`"]),
        ("optimizer.beta=1", ["`optimizer.beta`"]),
    ],
)
def test_keywords_are_checked_against_the_optimizer(override: str, words: list[str]) -> None:
    with pytest.raises(LayerwiseError) as caught:
        complete(load_config(None, ["optimizer=lanton", override]))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("- 1\n- 2\n", "expected sections"), ("training: [1\n", "line 2"), ("\tx", "not valid YAML")],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(LayerwiseError, match=words):
        load_config(file)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(LayerwiseError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LayerwiseError, match="cannot be read"):
        load_config(tmp_path / "x.yaml")


def test_replace_changes_a_copy_and_checks_it() -> None:
    config = Config()
    assert config.replace({"optimizer.lr": 0.5, "training.seed": 3}).training.seed == 3
    assert config.training.seed == 0
    with pytest.raises(LayerwiseError, match="lr"):
        config.replace({"optimizer.lr": -1.0})


def test_complete_writes_the_defaults_out() -> None:
    done = complete(load_config(None, ["optimizer=d-muon"]))
    assert done.optimizer.lr == base_rates()["gpt2-tiny"]["rates"]["d-muon"]
    assert done.optimizer.weight_decay == 0.1
    for changed in ("model=gpt2-small", "model.n_layer=1"):
        other = complete(load_config(None, ["optimizer=d-muon", changed]))
        assert other.optimizer.lr == 1e-3, "no rate was found for this model: the signature's default"
    same = complete(load_config(None, ["optimizer=d-muon", "model.n_layer=4"]))
    assert same.optimizer.lr == done.optimizer.lr, "the preset's own number of layers"
    assert done.training.steps == 300
    assert done.run.name == "gpt2-tiny-d-muon"
    assert complete(done) == done


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (19, 1), (20, 2), (199, 19), (200, 20), (300, 20)])
def test_the_default_warm_up_is_shorter_in_short_runs(steps: int, warmup: int) -> None:
    done = complete(load_config(None, [f"training.steps={steps}"]))
    assert done.schedule.warmup_steps == warmup
    assert complete(done) == done


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    assert complete(load_config(None, ["training.steps=5", "schedule.warmup_steps=4"])).schedule.warmup_steps == 4
    assert complete(load_config(None, ["training.steps=1", "schedule.warmup_steps=0"])).schedule.warmup_steps == 0
    with pytest.raises(LayerwiseError, match=r"schedule\.warmup_steps=5 in a run of 5 steps.*never reached"):
        complete(load_config(None, ["training.steps=5", "schedule.warmup_steps=5"]))


def test_the_page_is_the_one_that_the_code_makes() -> None:
    script = DOCS.with_name("make_configuration.py")
    made = runpy.run_path(str(script))["page"]()
    assert DOCS.read_text(encoding="utf-8") == made, "run: python docs/make_configuration.py"
    for name, section in Config.model_fields.items():
        assert all(f"| `{name}.{key}` | " in made for key in section.annotation.model_fields)  # type: ignore[union-attr]


def test_a_strategy_by_one_word_and_a_key_beside_it() -> None:
    config = load_config(None, ["parallel=fsdp2", "parallel.timeout=60"])
    assert (config.parallel.strategy, config.parallel.timeout) == ("fsdp2", 60.0)
