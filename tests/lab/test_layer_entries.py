"""What layers.jsonl says of parameters of many units, and who reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.lab.optimizers.registry import mean_multipliers
from layerwise.lab.runs.directory import RunWriter, read_run
from layerwise.lab.runs.environment import MOST_UNITS, layer_entries, parameter_table


@pytest.fixture
def model() -> nn.Module:
    """A grouped convolution: a unit for each group."""
    torch.manual_seed(0)
    channels = 2 * MOST_UNITS
    grouped = nn.Conv2d(2 * channels, 2 * channels, 3, groups=channels, bias=False)
    return nn.Sequential(nn.Conv2d(3, 2 * channels, 1, bias=False), grouped, nn.Flatten(), nn.LazyLinear(4))


def test_a_parameter_of_many_units_is_summarised(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(8, 3, 3, 3)
    model(x)
    optimizer = lw.Lanton(lw.param_groups(model), rates=lw.NoiseAdaptive(floor=1e-9))
    for _ in range(3):
        optimizer.zero_grad()
        model(x[torch.randperm(8)[:4]]).square().sum().backward()
        optimizer.step()
    rates = optimizer.layer_rates()
    channels = [unit for unit in rates if unit.startswith("1.weight[")]
    assert len(channels) == 2 * MOST_UNITS
    with RunWriter(tmp_path / "run") as writer:
        writer.update(name="run", status="finished", config={}, parameters=parameter_table(model))
        for step in (1, 2):
            writer.append("layers", {"step": step, "layers": layer_entries(rates)})
    run = read_run(tmp_path / "run")
    entries = run.layers[0]["layers"]
    assert entries.keys() == {"0.weight", "1.weight", "3.weight", "3.bias"}
    assert entries["0.weight"] == rates["0.weight"]._asdict()
    multipliers = [rates[unit].multiplier for unit in channels]
    assert min(multipliers) < max(multipliers)
    summary = entries["1.weight"]
    assert summary["units"] == len(channels)
    assert summary["multiplier"] == pytest.approx(fmean(multipliers), rel=1e-12)
    assert summary["smallest"]["multiplier"] == min(multipliers)
    assert summary["largest"]["noise"] == max(rates[unit].noise for unit in channels)
    assert len(json.dumps(entries)) < 2000

    history = run.history  # what the figures are drawn from
    assert history is not None
    row = history.units.index("1.weight")
    assert history.multiplier[row].tolist() == [summary["multiplier"]] * 2

    static = mean_multipliers(str(tmp_path / "run"))  # the fixed rates that control for adaptive ones
    assert {static[unit] for unit in channels} == {summary["multiplier"]}
    lw.Lanton(lw.param_groups(model), rates=lw.StaticRates(static))


@pytest.mark.parametrize("damaged", [1e308, -1e308, 10**400, "much", None, True])
def test_numbers_that_no_run_records_are_missing_values(tmp_path: Path, damaged: object) -> None:
    entry = {"noise": 1.0, "multiplier": 0.5, "lr": 1e-3}
    with RunWriter(tmp_path / "run") as writer:
        writer.update(name="run", status="finished", config={}, parameters=[])
    lines = [{"step": step, "layers": {"0.weight": entry}} for step in (1, 2)]
    lines[1]["layers"] = {"0.weight": {**entry, "multiplier": damaged}}
    (tmp_path / "run" / "layers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = read_run(tmp_path / "run").history
    assert history is not None
    assert history.multiplier[0, 0] == 0.5
    assert math.isnan(history.multiplier[0, 1])
