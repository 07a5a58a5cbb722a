"""The lab's training run over several processes is the run of one process.

In float64, and with gradients of full rank, the order of sums changes weights by some 1e-13 (see
test_distributed_parity). The loss itself is computed in float32, where a difference of 1e-16 before the rounding can
become one of 6e-8 in an entry: 1e-7 holds for weights and 1e-5 for what is recorded in float32, while a share counted
twice or a mean taken over the wrong number shows at 1e-3.
"""

import json
import math
from pathlib import Path

import pytest
from lab_runs import lab_run, results
from torch import Tensor
from torch.testing import assert_close

from layerwise.lab.runs.directory import read_run

TIMINGS = ("seconds", "tokens_per_second")


def close(a, b, where=""):
    """Numbers, tensors and what holds them, but for timings."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - set(TIMINGS):
            close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{where}.{i}")
    elif isinstance(a, Tensor):
        assert_close(a, b, rtol=1e-7, atol=1e-7 if a.dtype.itemsize > 4 else 1e-5, msg=lambda m: f"{where}: {m}")
    elif isinstance(a, float):
        assert math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9), (where, a, b)
    else:
        assert a == b, where


def same_run(folder: Path, one: str, other: str) -> None:
    first, second = results(folder, one), results(folder, other)
    for part in ("model", "optimizer", "step", "scheduler", "loss_sum"):
        close(first["state"][part], second["state"][part], part)
    close(first["metrics"], second["metrics"], "metrics")
    close(first["layers"], second["layers"], "layers")


def alone(cluster, folder: Path, changes, name="alone") -> None:
    assert cluster.run(1, lab_run, str(folder), {**changes, "run.name": name}) == ["finished"]


CASES = {
    "plain": {},
    "uneven": {"training.batch_size": 7},  # shares of 4 and 3, or 2, 2, 2 and 1
    "halves": {
        "training.accumulation": 2,
        "optimizer.rates": {"reference": "independent"},
        "training.clip_norm": None,
    },
    "adamw": {"optimizer.name": "adamw"},
    "d-muon": {"optimizer.name": "d-muon", "optimizer.rates": "norm_adaptive"},
    "adapters": {
        "model": {"preset": "decoder", "base_width": 8, "lora": {"rank": 2, "targets": ["query", "value"]}},
        "training.clip_norm": 0.1,
    },
}


QUICK = [("plain", "fsdp2", 2), ("uneven", "ddp", 2), ("halves", "ddp", 2)]
ALL = [(case, strategy, world) for case in CASES for strategy in ("ddp", "fsdp2") for world in (2, 4)]


@pytest.mark.parametrize(
    ("case", "strategy", "world"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in ALL],
)
def test_several_processes_train_what_one_does(cluster, tmp_path, case, strategy, world):
    alone(cluster, tmp_path, CASES[case])
    changes = {**CASES[case], "run.name": "shared", "parallel.strategy": strategy}
    assert cluster.run(world, lab_run, str(tmp_path), changes) == ["finished"] * world
    same_run(tmp_path, "alone", "shared")
    recorded = json.loads((tmp_path / "runs" / "shared" / "run.json").read_text())
    assert recorded["parallel"] == {"processes": world, "strategy": strategy}
    assert recorded["parameters"] == results(tmp_path, "alone")["info"]["parameters"]


def test_a_run_goes_on_with_other_processes(cluster, tmp_path):
    """4 sharded, 2 replicated, 1, 2 sharded: each stopped two steps after a checkpoint."""
    alone(cluster, tmp_path, {})
    folder, stages = str(tmp_path), [("fsdp2", 4, 2), ("fsdp2", 4, 5), ("ddp", 2, 8), ("ddp", 1, 9)]
    for strategy, world, stop in stages:
        changes = {"run.name": "moved", "parallel.strategy": strategy}
        assert cluster.run(world, lab_run, folder, changes, stop, True) == ["crashed"] * world
        assert json.loads((tmp_path / "runs" / "moved" / "run.json").read_text())["status"] == "running"
    changes = {"run.name": "moved", "parallel.strategy": "fsdp2"}
    assert cluster.run(2, lab_run, folder, changes, 0, True) == ["finished"] * 2
    same_run(tmp_path, "alone", "moved")


def test_dropout_is_drawn_by_every_process_and_resumed_bit_for_bit(cluster, tmp_path):
    changes = {"model.resid_pdrop": 0.2, "run.name": "whole"}
    cluster.run(2, lab_run, str(tmp_path), changes)
    changes["run.name"] = "broken"
    cluster.run(2, lab_run, str(tmp_path), changes, 5)
    cluster.run(2, lab_run, str(tmp_path), changes, 0, True)
    whole, broken = (results(tmp_path, name)["state"] for name in ("whole", "broken"))
    for name, weight in whole["model"].items():
        assert weight.equal(broken["model"][name])
    (other,) = whole["random_of_others"]
    assert not whole["random"]["torch"].equal(other["torch"])  # not the same masks everywhere


def test_what_ends_a_run_ends_it_on_every_process(cluster, tmp_path):
    folder = str(tmp_path)

    def ends(changes, resume=False):
        first, second = cluster.run(2, lab_run, folder, changes, 0, resume)
        assert first == second
        return first

    assert ends({"optimizer.lr": 1e30, "training.clip_norm": None, "run.name": "lost"}) == "diverged"
    assert results_status(tmp_path, "lost") == "diverged"
    assert "--overwrite replaces it" in ends({"run.name": "lost"})
    assert ends({"training.batch_size": 1}) == (
        "training.batch_size=1 in training.accumulation=1 parts leaves 1 a part, fewer than 2 processes:"
        " raise the batch size, or lower the accumulation or the number of processes"
    )
    replicas = {"optimizer.rates": {"reference": "replicas"}}
    assert "= 7 sequences are not a multiple of 2 processes" in ends({**replicas, "training.batch_size": 7})
    assert "data.validation_fraction" in ends({"data.validation_fraction": 0.001})
    assert not (tmp_path / "runs" / "gpt2-tiny-lanton").exists()


def results_status(folder: Path, name: str) -> str:
    return json.loads((folder / "runs" / name / "run.json").read_text())["status"]


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_function_space_rates_are_those_of_the_global_batch(cluster, tmp_path, strategy):
    """Recorded, and matched, and both taken up again by another number of processes."""
    rates = {
        "record_every": 4,
        "match": "uniform",
        "match_step": 2,
        "match_every": 5,
        "batches": 2,
        "probes": 4,
    }
    changes = {
        **{f"function_space.{key}": value for key, value in rates.items()},
        "model": {"preset": "decoder", "base_width": 8},
        "training.batch_size": 7,
    }
    alone(cluster, tmp_path, changes)
    changes |= {"run.name": "shared", "parallel.strategy": strategy}
    assert cluster.run(2, lab_run, str(tmp_path), changes, 4) == ["crashed"] * 2
    assert cluster.run(4, lab_run, str(tmp_path), changes, 0, True) == ["finished"] * 4
    same_run(tmp_path, "alone", "shared")
    one, several = (read_run(tmp_path / "runs" / name) for name in ("alone", "shared"))
    assert len(one.function_space) == 3
    close(one.function_space, several.function_space, "function_space")
    assert [matching["step"] for matching in one.info["matching"]] == [2, 7]
    close(one.info["matching"], several.info["matching"], "matching")


def test_noise_between_replicas_is_taken_up_again(cluster, tmp_path):
    """Replicas are processes, so the run of one process is none to compare with: DDP and FSDP2 must agree."""
    folder, noise = str(tmp_path), {"optimizer.rates": {"reference": "replicas"}, "training.accumulation": 2}
    assert "this run has one" in cluster.run(1, lab_run, folder, noise)[0]
    cluster.run(2, lab_run, folder, {**noise, "run.name": "whole"})
    broken = {**noise, "run.name": "broken", "parallel.strategy": "fsdp2"}
    assert cluster.run(2, lab_run, folder, broken, 5) == ["crashed"] * 2
    assert cluster.run(2, lab_run, folder, broken, 0, True) == ["finished"] * 2
    same_run(tmp_path, "whole", "broken")
    last = results(tmp_path, "whole")["layers"][-1]["layers"]
    assert all(unit["squared_norm"] > 0 for unit in last.values())
