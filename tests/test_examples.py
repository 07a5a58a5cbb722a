"""The trainer examples run as written, on a CPU, without network: they train, resume exactly and log layer rates.

Each example compares a resumed run with an uninterrupted one itself; here is what else it promises.
"""

from __future__ import annotations

import runpy
from itertools import pairwise
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def one_thread():
    """On small matrices more threads only wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_hf_trainer_learns_logs_each_layer_and_resumes(tmp_path):
    history = main_of("hf_trainer")(str(tmp_path))
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
    assert (tmp_path / "checkpoint-3" / "function_space.pt").exists()


def test_lightning_logs_each_layer_and_moves_every_group(tmp_path):
    rows = main_of("lightning_module")(str(tmp_path))
    adamw, muon = "layer_lr/network.0.bias", "layer_lr/network.2.weight"
    logged = [row for row in rows if row[adamw]]
    assert [int(row["step"]) for row in logged] == list(range(2, 17, 2))
    for row, later in pairwise(logged):
        assert float(later[adamw]) < float(row[adamw])
        assert float(later[muon]) < float(row[muon])
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert losses[-1] < losses[0]


def test_accelerate_loop(tmp_path):
    first, last = main_of("accelerate_loop")(str(tmp_path))
    assert last["loss"] < first["loss"]
    assert 0 < first["lr/0.weight"] <= 0.025  # half way down the cosine from 0.05
    assert last["lr/0.weight"] == pytest.approx(0.0, abs=1e-12)


def test_peft_trains_adapters_each_at_its_own_rate():
    losses, rates = main_of("peft_lora")()
    assert losses[-1] < losses[0] - 0.1
    assert all("lora_" in unit for unit in rates)
    assert len({rate.lr for unit, rate in rates.items() if "lora_B" in unit}) > 1


def test_layer_rates_of_another_optimizer_are_refused():
    import torch

    from layerwise import LayerwiseError
    from layerwise.integrations.logged import rates_to_log

    with pytest.raises(LayerwiseError, match="SGD"):
        rates_to_log(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
