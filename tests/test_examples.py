"""The trainer examples run as written, on a CPU, without network: they train, are killed, resume, and log layer rates."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import count, pairwise
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
#: The optimizer step in which each is killed: some steps after a checkpoint.
KILLED_AT = {"hf_trainer": 5, "lightning_module": 11, "accelerate_loop": 12, "peft_lora": 14}


@pytest.fixture(autouse=True)
def one_thread():
    """On small matrices more threads only wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def example(name: str) -> dict[str, Any]:
    return run_path(str(EXAMPLES / f"{name}.py"))


class Killed(BaseException):
    """What no trainer should catch and go on."""


def train_until_killed(name: str, folder: str, die: Any) -> None:
    """Run an example; in one of its optimizer steps `die()` is called."""
    from layerwise.optim.work.job import Lineup

    refresh, steps = Lineup.refresh, count(1)

    def mortal(*given: Any) -> Any:
        if next(steps) == KILLED_AT[name]:
            die()
        return refresh(*given)

    Lineup.refresh = mortal
    try:
        example(name)["train"](folder)
    finally:
        Lineup.refresh = refresh


def killed_and_resumed(name: str, folder: Path) -> tuple[Any, Any]:
    """What `train` gives for an uninterrupted run in folder/whole, and for one in folder/parts that is cut in two."""

    def die() -> None:
        raise Killed

    whole = example(name)["train"](str(folder / "whole"))
    with pytest.raises(Killed):
        train_until_killed(name, str(folder / "parts"), die)
    return whole, example(name)["train"](str(folder / "parts"))


def assert_same_weights(whole: Any, parts: Any) -> None:
    """To the bit: the same operations in the same order, from numbers that were saved without loss."""
    import torch

    for name, weight in whole.named_parameters():
        assert torch.equal(weight, parts.get_parameter(name)), name


def test_watch_layers_draws_what_the_watch_has_written(tmp_path):
    watch = example("watch_layers")["train"](tmp_path, steps=6)
    assert [record.step for record in watch.records] == [1, 5]
    assert (tmp_path / "watch.png").stat().st_size > 10_000  # an empty figure of that size has 3 kB
    assert len((tmp_path / "watch.jsonl").read_text().splitlines()) == 2


def test_hf_trainer_learns_logs_each_layer_and_resumes(tmp_path):
    whole, parts = killed_and_resumed("hf_trainer", tmp_path)
    assert_same_weights(whole.model, parts.model)
    history = parts.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    rates = {entry["step"]: entry for entry in history if "layer_lr/transformer.wte.weight" in entry}
    assert list(rates) == [2, 4, 6]
    # The rates are those the logged step took: LANTON's quietest unit of a group runs at the scheduled rate.
    scheduled = {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    for step, entry in rates.items():
        units = {key: value for key, value in entry.items() if key.startswith("layer_lr/")}
        assert max(units.values()) == pytest.approx(scheduled[step])
        assert min(units.values()) < scheduled[step]
        assert "layer_lr/transformer.h.0.attn.c_attn.weight[q]" in units
    assert (tmp_path / "parts" / "checkpoint-3" / "function_space.pt").exists()


def test_lightning_logs_each_layer_moves_every_group_and_resumes(tmp_path):
    assert_same_weights(*killed_and_resumed("lightning_module", tmp_path))
    rows = example("lightning_module")["logged"](str(tmp_path / "whole"))
    adamw, muon = "layer_lr/network.0.bias", "layer_lr/network.2.weight"
    logged = [row for row in rows if row[adamw]]
    assert [int(row["step"]) for row in logged] == list(range(2, 17, 2))
    for row, later in pairwise(logged):
        assert float(later[adamw]) < float(row[adamw])
        assert float(later[muon]) < float(row[muon])
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert losses[-1] < losses[0]
    after = example("lightning_module")["logged"](str(tmp_path / "parts"))
    assert [row for row in after if row[adamw]][-1] == logged[-1]


def test_accelerate_loop_and_its_resume(tmp_path):
    whole, parts = killed_and_resumed("accelerate_loop", tmp_path)
    assert_same_weights(whole.model, parts.model)
    first, last = whole.logs
    assert parts.logs == [last]
    assert last["loss"] < first["loss"]
    assert 0 < first["lr/0.weight"] <= 0.025  # half way down the cosine from 0.05
    assert last["lr/0.weight"] == pytest.approx(0.0, abs=1e-12)


def test_peft_trains_adapters_each_at_its_own_rate_and_resumes(tmp_path):
    (whole, logs), (parts, resumed) = killed_and_resumed("peft_lora", tmp_path)
    assert_same_weights(whole, parts)
    assert resumed == logs
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.1
    rates = {unit: rate for unit, rate in logs[-1].items() if unit != "loss"}
    assert all("lora_" in unit for unit in rates)
    assert len({rate for unit, rate in rates.items() if "lora_B" in unit}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED_AT)
def test_a_real_kill(name, tmp_path):
    """The same with kill -9, so that nothing is tidied up."""
    command = f"from test_examples import *; train_until_killed({name!r}, {str(tmp_path / 'parts')!r}, kill_me)"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parent, env=environment)
    assert ended.returncode == -signal.SIGKILL
    models = [example(name)["train"](str(tmp_path / part)) for part in ("whole", "parts")]
    if name == "peft_lora":
        models = [model for model, _ in models]
    assert_same_weights(*(getattr(model, "model", model) if name != "peft_lora" else model for model in models))


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_layer_rates_of_another_optimizer_are_refused():
    import torch

    from layerwise import LayerwiseError
    from layerwise.integrations.logged import RateLog

    with pytest.raises(LayerwiseError, match="SGD"):
        RateLog()(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))


@pytest.mark.filterwarnings("ignore")
def test_rates_of_another_rank_are_used_by_the_trainer(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    found = example("lora_rank")
    rates, loss = found["train"](str(tmp_path))
    assert len(rates) == 12  # A and B of three matrices in two blocks
    assert sum(rate > found["TUNED_RATE"] for name, rate in rates.items() if "lora_B" in name) >= 5
    assert loss < 3.4  # it learns: a uniform guess among 32 is 3.47
