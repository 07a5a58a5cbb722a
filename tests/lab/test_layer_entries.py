"""What is read of layers.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from layerwise.lab.runs.directory import RunWriter, read_run


def test_runs_of_the_first_release_call_the_squared_norm_noise(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run") as writer:
        writer.update(name="run", status="finished", config={}, parameters=[])
    lines = [
        {"step": n, "layers": {"w": {key: float(n), "multiplier": 1.0}}} for n, key in enumerate(("noise", "squared_norm"))
    ]
    (tmp_path / "run" / "layers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = read_run(tmp_path / "run").history
    assert history is not None
    assert history.squared_norm.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("damaged", [1e308, -1e308, 10**400, "much", None, True])
def test_numbers_that_no_run_records_are_missing_values(tmp_path: Path, damaged: object) -> None:
    entry = {"squared_norm": 1.0, "multiplier": 0.5, "lr": 1e-3}
    with RunWriter(tmp_path / "run") as writer:
        writer.update(name="run", status="finished", config={}, parameters=[])
    lines = [{"step": step, "layers": {"0.weight": entry}} for step in (1, 2)]
    lines[1]["layers"] = {"0.weight": {**entry, "multiplier": damaged}}
    (tmp_path / "run" / "layers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = read_run(tmp_path / "run").history
    assert history is not None
    assert history.multiplier[0, 0] == 0.5
    assert math.isnan(history.multiplier[0, 1])
