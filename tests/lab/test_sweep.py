"""Sweeps: what is planned, that nothing is run twice, and what the table says of known curves."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_tree

from layerwise.common.text_table import aligned
from layerwise.errors import LayerwiseError
from layerwise.lab.config.keys import validate
from layerwise.lab.config.schema import Config
from layerwise.lab.experiments.sweep import run_sweep
from layerwise.lab.experiments.sweep.engines import LocalEngine
from layerwise.lab.experiments.sweep.run_sweep import (
    Point,
    SweepConfig,
    append_result,
    loss_of,
    make_plan,
    open_results,
    read_results,
)
from layerwise.lab.experiments.sweep.sweep_report import (
    Curve,
    Panels,
    analyse,
    best_rates,
    cells,
    details,
    shift_interval,
    titles,
    transfer_figure,
    transfers,
    write_report,
)
from layerwise.lab.training.run import record, train


def sweep_config(folder: Path, **changes: Any) -> SweepConfig:
    """A sweep of 12 trials of a fraction of a second each; changes are written `sweep__seeds=[0, 1]`."""
    tree = tiny_tree(folder)
    tree["model"] = {"preset": "decoder", "base_width": 4, "base_heads": 1, "base_blocks": 1}
    tree["training"] |= {"steps": 3, "eval_every": 3}
    tree["function_space"] = {"probes": 2, "batches": 1}
    tree["run"]["name"] = "sweep"
    tree["sweep"] = {"sizes": [4, 8], "lr": [0.01, 0.1], "seeds": [0], "base_seeds": [0]}
    config = validate(SweepConfig, tree)
    return config.replace({key.replace("__", "."): value for key, value in changes.items()})


def test_a_grid_is_a_list_or_equal_factors() -> None:
    sweep = SweepConfig.model_validate({"sweep": {"lr": {"low": 1e-3, "high": 1e-1, "count": 5}}}).sweep
    assert sweep.grid("standard") == [0.001, 0.003162, 0.01, 0.03162, 0.1]
    assert sweep.step_of("standard") == pytest.approx(math.sqrt(10), rel=1e-9)
    sweep = SweepConfig.model_validate({"sweep": {"lr": [1, 2], "lr_of": {"uniform": [8, 4]}}}).sweep
    assert (sweep.grid("flerm"), sweep.grid("uniform")) == ([1, 2], [4, 8])
    deep = SweepConfig.model_validate({"sweep": {"axis": "depth"}}).sweep
    assert deep.methods == ["standard", "flerm", "uniform"]  # what is not asked for and cannot be is left out


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"lr": {"low": 1, "high": 0.1, "count": 3}}, "a grid is a list of rates, or"),
        ({"lr": [0.1, -1]}, "greater than 0"),
        ({"seeds": [1, 1]}, "sweep.seeds=.* twice"),
        ({"axis": "depth", "methods": ["standard", "mup"]}, "mup is a rule for widths"),
        ({"methds": ["flerm"]}, "did you mean `methods`"),
    ],
)
def test_sweeps_that_cannot_be(section: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerwiseError, match=message):
        validate(SweepConfig, {"sweep": section})


def test_a_sweep_sets_rates_and_matches_itself(tmp_path: Path) -> None:
    for key, value in (("optimizer.lr", 0.1), ("function_space.match", "uniform")):
        with pytest.raises(LayerwiseError, match=f"{key}=.* leave the key out"):
            make_plan(sweep_config(tmp_path).replace({key: value}))


def test_a_sweep_evaluates(tmp_path: Path) -> None:
    with pytest.raises(LayerwiseError, match=r"training.eval_every=0 in a sweep: .* set 1 or more"):
        make_plan(sweep_config(tmp_path, training__eval_every=0))


def test_equal_trials_are_one(tmp_path: Path) -> None:
    plan = make_plan(sweep_config(tmp_path))
    assert len(plan.points) == 4 * 2 * 2
    at_base = {plan.points[Point(method, 4, 0.1, 0)].id for method in ("standard", "flerm", "mup")}
    assert len(at_base) == 1  # the base model is trained plainly, whatever takes its rate over
    assert len(plan.trials) == 2 * (2 + 4)
    large = {method: plan.points[Point(method, 8, 0.1, 0)] for method in ("standard", "flerm", "uniform", "mup")}
    assert large["mup"].config["optimizer"]["role_factors"] == {"hidden": 0.5, "head": 0.5}
    assert large["flerm"].base is not None
    assert large["uniform"].base is None
    assert large["standard"].config["model"]["width"] == 2


def test_the_identity_of_a_trial_is_all_that_its_result_depends_on(tmp_path: Path) -> None:
    config = sweep_config(tmp_path)
    ids = set(make_plan(config).trials)
    assert set(make_plan(config.replace({"run.name": "other", "run.dir": "elsewhere"})).trials) == ids
    assert ids < set(make_plan(config.replace({"sweep.lr": [0.01, 0.1, 0.5]})).trials)
    assert ids < set(make_plan(config.replace({"sweep.sizes": [4, 8, 16]})).trials)
    for key, value in (
        ("training.batch_size", 2),
        ("data.seq_len", 8),
        ("model.norm", "post"),
        ("optimizer.eps", 1e-6),
    ):
        assert not ids & set(make_plan(config.replace({key: value})).trials), key
    # What only the measurement depends on concerns the matched trials alone.
    measured = ids - set(make_plan(config.replace({"sweep.base_seeds": [1]})).trials)
    assert measured == {t.id for p, t in make_plan(config).points.items() if (p.method, p.size) == ("flerm", 8)}


def test_half_a_last_line_is_cut_and_one_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "sweep" / "results.jsonl"
    with open_results(path.parent) as file:
        append_result(file, {"id": "a", "status": "finished", "loss": 1.5})
        with pytest.raises(LayerwiseError, match="another process is running it"), open_results(path.parent):
            pass
    with open(path, "a") as handle:
        handle.write('{"id":"b","sta')
    assert list(read_results(path.parent)) == ["a"]
    with open_results(path.parent) as file:
        append_result(file, {"id": "c", "status": "diverged", "loss": 0.1})
    results = read_results(path.parent)
    assert [loss_of(row, "loss") for row in results.values()] == [1.5, math.inf]


def test_finished_trials_are_never_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sweep_config(tmp_path, sweep__methods=["standard", "flerm"])
    run_sweep.run_sweep(config, LocalEngine(0))
    path = config.run_path / "results.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 2 + 2 * 2
    rows = [json.loads(line) for line in lines]
    assert all(row["status"] == "finished" and math.isfinite(row["val_loss"]) for row in rows)
    matched = [row["matched"] for row in rows if "matched" in row]
    assert len(matched) == 2
    assert all(set(rates) >= {"embedding.weight", "head.bias"} for rates in matched)

    ran = []
    run_trial = run_sweep.run_trial
    monkeypatch.setattr(run_sweep, "run_trial", lambda trial, *a, **k: ran.append(trial.id) or run_trial(trial, *a, **k))
    run_sweep.run_sweep(config, LocalEngine(0))
    assert ran == []
    # Killed in the middle of the last line: that trial alone is run again, and ends as it did.
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    run_sweep.run_sweep(config, LocalEngine(0))
    assert ran == [rows[-1]["id"]]
    again = json.loads(path.read_text().splitlines()[-1])
    assert {**again, "seconds": 0} == {**rows[-1], "seconds": 0}

    table = write_report(config)
    assert [(row.method, row.size) for row in table] == [
        ("standard", 4),
        ("standard", 8),
        ("flerm", 4),
        ("flerm", 8),
    ]
    assert table[0].best == table[2].best
    assert all(row.edge for row in table)  # a grid of two rates has nothing but ends
    for name in ("transfer.png", "transfer.svg", "table.md", "table.json"):
        assert (path.parent / name).stat().st_size > 100


def test_worker_processes_give_the_same_results(tmp_path: Path) -> None:
    config = sweep_config(tmp_path, sweep__methods=["flerm"], sweep__lr=[0.01, 0.02])
    side_by_side = config.replace({"run.name": "workers"})
    run_sweep.run_sweep(config, LocalEngine(0))
    run_sweep.run_sweep(side_by_side, LocalEngine(1))
    one, other = (read_results(each.run_path) for each in (config, side_by_side))
    assert {id: row["loss"] for id, row in one.items()} == {id: row["loss"] for id, row in other.items()}


def curve(method: Any, size: float, losses: dict[float, float], initial: float = 5.0) -> Curve:
    return Curve(method, size, {lr: [loss - 0.1, loss + 0.1] for lr, loss in losses.items()}, initial)


def test_the_table_of_known_curves() -> None:
    inf = math.inf
    base = curve("standard", 1, {1: 3, 2: 2, 4: 1, 8: 1.5, 16: 2.1})
    large = curve("standard", 8, {1: 0.8, 2: 0.9, 4: 2, 8: inf, 16: inf})
    middle = curve("standard", 2, {1: 2, 2: 0.9, 4: 1, 8: 3, 16: inf})
    first, between, last = transfers([base, middle, large], {"standard": 2.0})

    assert (first.best, first.shift, first.grid_steps, first.edge) == (4, 1, 0, False)
    # 1 + 0.15 of the way from 1 to 5 is 1.6: 16 is the first rate that fails, a factor of 4 from the best.
    assert (first.to_failure, first.open_ended, first.safety) == (4, False, 1)
    assert first.spread == pytest.approx(0.1)

    assert (between.best, between.shift, between.grid_steps, between.carried_loss) == (2, 0.5, -1, 1)
    assert (between.to_failure, between.safety) == (2, 2)  # 8 fails, twice the base's best

    assert (last.best, last.grid_steps, last.edge) == (1, -2, True)
    assert (last.own_loss, last.carried_loss) == (pytest.approx(0.8), pytest.approx(2))
    assert (last.to_failure, last.safety) == (1, 4)  # the base's best itself fails: 2 > 0.8 + 0.15 * 4.2
    assert cells(last)[2:5] == ("1!", "0.25x!", "-2")

    printed = "\n".join(aligned([titles("init_scale"), *map(cells, (first, between, last))]))
    assert all(cell in printed for row in (first, between, last) for cell in cells(row))


def test_nothing_fails_or_everything_diverges() -> None:
    flat = curve("mup", 1, {1: 1.0, 2: 0.9, 4: 1.0})
    lost = curve("mup", 2, {1: math.inf, 2: math.inf, 4: math.nan})
    open_ended, diverged = transfers([flat, lost], {"mup": 2.0})
    # The grid ends a factor of 2 above the best: nothing is known of a factor of 4.
    assert (open_ended.to_failure, open_ended.open_ended, open_ended.safety) == (2, True, None)
    assert (diverged.best, diverged.shift, diverged.own_loss, diverged.carried_loss) == (
        None,
        None,
        None,
        None,
    )
    assert cells(diverged)[2] == "diverged"


def test_a_diverged_rate_fails_where_the_initial_loss_is_unknown() -> None:
    known = curve("standard", 1, {1: 1.0, 2: 0.9, 4: 1.1, 8: math.inf}, initial=math.inf)
    assert known.failing == 8
    low, high = transfer_figure([Panels("", [known], "width", "Loss")]).axes[0].get_ylim()
    assert low < 0.9 < high < 2


def test_unfinished_sweeps_can_be_looked_at(tmp_path: Path) -> None:
    config = sweep_config(tmp_path)
    trial = make_plan(config).points[Point("standard", 4, 0.1, 0)]
    with open_results(config.run_path) as file:
        append_result(file, {"id": trial.id, "status": "finished", "val_loss": 2.5, "first_val_loss": 5.0})
    curves, rows = analyse(config)
    assert {(c.method, c.size) for c in curves} == {("standard", 4), ("flerm", 4), ("mup", 4)}
    assert all(row.own_loss == 2.5 for row in rows)


@pytest.mark.parametrize("axis", ["depth", "init_scale", "lora_rank"])
def test_every_axis_changes_the_model_and_matches_it_to_the_base(tmp_path: Path, axis: str) -> None:
    config = sweep_config(
        tmp_path,
        sweep__axis=axis,
        sweep__sizes=[1, 4],
        sweep__methods=["flerm", "uniform"],
        function_space__method="exact",
        schedule={"name": "constant", "warmup_steps": 0},
    )
    if axis == "lora_rank":
        changes = {"model.lora": {"targets": ["query"]}, "function_space.match_step": 2}
        config = config.replace(changes)
    plan = make_plan(config)
    file = tmp_path / "base.json"
    base = record(plan.base, [0])
    base.save(file)
    targets = {}
    for method, match in (("flerm", str(file)), ("uniform", "uniform")):
        trial = plan.points[Point(method, 4, 0.1, 0)]  # type: ignore[arg-type]
        trained = validate(Config, {**trial.config, "run": {"dir": str(tmp_path), "name": method}})
        run_info = train(trained.replace({"function_space.match": match})).info
        shapes = {row["name"]: row["shape"] for row in run_info["parameters"]}
        [matching] = run_info["matching"]
        targets[method] = {name: row["target"] for name, row in matching["rates"].items()}
        if axis == "depth":
            assert {name.split(".")[1] for name in shapes if "blocks" in name} == set("0123")
        if axis == "lora_rank":
            assert {min(shape) for name, shape in shapes.items() if "lora" in name} == {4}

    rates = base.at(config.function_space.match_step - 1)
    known = {name: 0.1 / config.sweep.base_lr * rate.value for name, rate in rates.items() if rate.value}
    if axis != "depth":
        assert targets["flerm"] == pytest.approx(known)
        assert set(targets["uniform"]) == set(known)
        return
    # One block becomes four, each with a quarter of its rates; the rest keeps its own.
    for name, target in targets["flerm"].items():
        inside = name.startswith("blocks.")
        source = re.sub(r"^blocks\.\d", "blocks.0", name)
        assert target == pytest.approx(known[source] / (4 if inside else 1)), name
        assert targets["uniform"][name] == pytest.approx(0.1 / len(known) / (4 if inside else 1)), name


def test_ranks_of_adapters_on_a_pretrained_model(tmp_path: Path) -> None:
    config = sweep_config(tmp_path)
    pretrained = validate(Config, {**config.model_dump(exclude={"sweep"}), "run": {"dir": str(tmp_path), "name": "start"}})
    train(pretrained.replace({"optimizer.lr": 0.01, "run.tensorboard": False}))
    config = config.replace(
        {
            "model.start": str(tmp_path / "start"),
            "model.lora": {"targets": ["query", "value"], "fixed": "A"},
            "function_space.match_step": 2,
            "sweep.axis": "lora_rank",
            "sweep.sizes": [1, 4],
            "sweep.methods": ["flerm"],
        }
    )
    run_sweep.run_sweep(config, LocalEngine(0))
    rows = list(read_results(config.run_path).values())
    matched = [row["matched"] for row in rows if "matched" in row]
    assert len(rows) == 4
    assert len(matched) == 2
    assert all("lora_B" in name for rates in matched for name in rates)


def test_a_shift_has_the_interval_that_its_seeds_allow() -> None:
    sure = Curve("flerm", 1, {1: [3, 3.1, 3.2], 2: [1, 1.1, 1.2], 4: [2, 2.1, 2.2]}, 5.0)
    # Best at 2, at 4, and at 4 for one seed each; on the mean at 4. Of 27 resamples, 7 have seed 0 at least twice.
    split = Curve("flerm", 2, {1: [9, 9, 9], 2: [1, 2, 2], 4: [2, 1, 1]}, 5.0)
    assert best_rates(sure) == {2: 27}
    assert best_rates(split) == {2: 7, 4: 20}
    assert shift_interval(sure, split, 2.0) == (0, 1)
    assert shift_interval(split, split, 2.0) == (-1, 1)
    _, row = transfers([sure, split], {"flerm": 2.0})
    assert (row.interval, row.grid_steps, row.half_loss) == ((0, 1), 1, 9)
    assert details(row) == ("0..+1", "9.000")


def test_one_seed_or_missing_ones_give_no_interval() -> None:
    one = Curve("flerm", 1, {1: [3], 2: [1]}, 5.0)
    missing = Curve("flerm", 2, {1: [3, 2], 2: [1]}, 5.0)
    assert shift_interval(one, one, 2.0) is None
    assert shift_interval(missing, missing, 2.0) is None
    lost = Curve("flerm", 2, {1: [math.inf, 2], 2: [1, math.inf]}, 5.0)
    assert best_rates(lost) == {1: 1, 2: 1}  # where both seeds are drawn, no rate has finite losses
