"""`benchmarks/roles_carried.py`: a dry run on sizes that say nothing, and what its methods are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import layerwise as lw

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The study on a text of a few lines, with one rate, one role, one factor."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import roles_carried
    from rate_rule import Store

    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text that is long enough\n" for i in range(300)))
    monkeypatch.setattr(roles_carried, "RATES", (0.01,))
    monkeypatch.setattr(roles_carried, "ROLES", ("head",))
    monkeypatch.setattr(roles_carried, "ROLE_FACTORS", (2.0,))
    monkeypatch.setattr(roles_carried, "AROUND", (1.0,))
    monkeypatch.setattr(roles_carried, "OTHER_RATES", {})
    sizes = {"width": (16, 32), "started": (16, 32), "depth": (1, 2), "wider": (16, 32)}
    monkeypatch.setattr(roles_carried, "AXES", sizes)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(roles_carried, "MODEL", {**roles_carried.MODEL, "num_hidden_layers": 1, **small})
    changes = {
        "data.source": "files", "data.paths": [str(text)], "data.tokenizer": "byte", "data.seq_len": 16,
        "training.batch_size": 2, "training.eval_batches": 1, "function_space.probes": 2, "schedule.warmup_steps": 1,
    }  # fmt: skip
    return roles_carried.Study(Store(tmp_path / "rows.jsonl"), tmp_path / "bases", [0], 3, changes)


@pytest.mark.filterwarnings("ignore:FLeRM left")
@pytest.mark.parametrize(
    ("axis", "title"),
    [
        ("width", "## width, 16 to 32"),
        pytest.param("started", "## started, 16 to 32", marks=pytest.mark.slow),
        pytest.param("depth", "## depth, 1 to 2", marks=pytest.mark.slow),
        pytest.param("wider", "## wider, 16 to 32", marks=pytest.mark.slow),
    ],
)
def test_the_study_runs_from_end_to_end_makes_nothing_twice_and_is_tabled(study, monkeypatch, axis, title):
    import roles_carried
    from roles_carried_table import page

    study.run([axis])
    rows = study.store.results()
    assert all(row["loss"] is not None for row in rows)
    unfit = {
        "width": set(),
        "wider": set(),
        "depth": {"copied, times 1/width"},
        "started": {*list(roles_carried.METHODS)[:3]},
    }
    assert {row["trial"]["method"] for row in rows} == {*roles_carried.METHODS, "tuned"} - unfit.get(axis, set())
    monkeypatch.setattr(roles_carried, "train", lambda *_, **__: pytest.fail("a run was made again"))
    study.run([axis])
    assert study.store.results() == rows
    made = page(rows, roles_carried.METHODS, roles_carried.AXES, roles_carried.CHANGED)
    assert title in made
    assert "| function space, factors |" in made


def test_weights_are_started_larger_on_the_small_model_alone(study):
    import roles_carried

    trial = roles_carried.Trial("started", 16, "tuned", None, 0.01, (), 0)
    small, large, plain = (study.plain(each) for each in (trial, replace(trial, size=32), replace(trial, axis="width")))
    ranges = [config.model.settings.get("initializer_range", 0.02) for config in (small, large, plain)]
    assert ranges == [0.04, 0.02, 0.02]
    assert large == study.plain(replace(trial, axis="width", size=32))
    wider = study.plain(replace(trial, axis="wider"))
    assert wider.model.settings["initializer_range"] == pytest.approx(0.02 * 8**0.5)


def test_factors_are_copied_and_matrices_and_head_get_one_over_the_width(study):
    import roles_carried

    trial = roles_carried.Trial("width", 32, "copied factors", None, 0.01, (("head", 4.0), ("vector", 2.0)), 0)
    assert trial.factors == {"head": 4.0, "vector": 2.0}
    scaled = replace(trial, method="copied, times 1/width")
    assert scaled.factors == {"hidden": 0.5, "head": 2.0, "vector": 2.0}
    assert replace(scaled, size=16).factors == {"hidden": 1.0, "head": 4.0, "vector": 2.0}
    assert replace(scaled, axis="wider").factors == scaled.factors


def test_a_base_with_factors_or_multipliers_asks_as_much_more_of_a_tensor(study):
    """A base's rate per unit of the base rate is proportional to the tensor's factor (its step is)."""
    import roles_carried

    trial = roles_carried.Trial("width", 32, "function space, one rate", None, 0.01, (), 0)
    plain = lw.BaseRates.load(study.base(trial))
    factors = replace(trial, method="function space, factors", roles=(("head", 4.0),))
    tuned = lw.BaseRates.load(study.base(factors))
    for name, rate in plain.at(0).items():
        # the same first step, but for float32's rounding of the step that is measured
        more = 4.0 if name == "lm_head.weight" else 1.0
        assert tuned.at(0)[name].value == pytest.approx(more * rate.value, rel=1e-4, abs=1e-12)
    name = "model.layers.0.mlp.up_proj.weight"
    slower = roles_carried.multiplied(plain, {name: 0.25})
    assert slower.at(0)[name].value == 0.25 * plain.at(0)[name].value
    assert slower.at(0)["lm_head.weight"] == plain.at(0)["lm_head.weight"]
    assert json.loads(study.base(trial).read_text())["format"]  # a file that `lw.FLeRM(base=...)` takes
