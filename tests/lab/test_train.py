from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_config

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import Config, ScheduleConfig
from layerwise.lab.data.batches import TextData
from layerwise.lab.models.families import build_model, loss
from layerwise.lab.models.family import Examples
from layerwise.lab.optimizers.registry import build_optimizer, optimizers
from layerwise.lab.runs import recorded
from layerwise.lab.runs.checkpoint import list_checkpoints, load_checkpoint
from layerwise.lab.runs.directory import RunWriter, find_runs, has_ended, read_run
from layerwise.lab.runs.recorded import Run
from layerwise.lab.training.observers import Observer, QuietProgress
from layerwise.lab.training.run import complete, train


def weights(run: Run) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_checkpoint(list_checkpoints(run.path / "checkpoints")[0])["model"]
    return state


def literal_loop(config: Config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Training as anybody would write it, with torch alone."""
    data = TextData(config)
    model = build_model(config.model, Examples(data.vocab_size, config.data.seq_len), config.training.seed)
    optimizer = build_optimizer(model, complete(config).optimizer)
    base = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(config.training.steps):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * config.schedule.factor(step, config.training.steps)
        batch = data.batch(step)
        value = loss(model, batch.inputs, batch.targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("name", optimizers())
def test_a_run_is_the_literal_loop(tmp_path: Path, name: str) -> None:
    config = tiny_config(tmp_path, optimizer__name=name, training__log_every=1, training__clip_norm=0.5)
    run = train(config)
    losses, final = literal_loop(config)
    assert run.status == "finished"
    assert run.series("loss").values.tolist() == losses
    assert all(torch.equal(value, final[key]) for key, value in weights(run).items())


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    whole = train(tiny_config(tmp_path, run__name="whole", optimizer__eps=1e-3))
    parts = train(
        tiny_config(tmp_path, run__name="parts", optimizer__eps=1e-3, training__accumulation=4),
    )
    # Sums in another order: float32 rounding, over 12 steps of AdamW with an eps that does not amplify it.
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[key], value, rtol=1e-4, atol=2e-6)
    assert parts.result["tokens"] == whole.result["tokens"] == 12 * 4 * 16


def test_the_record_is_complete(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, optimizer__name="lanton", run__tensorboard=True)
    run = train(config)
    assert run.path == tmp_path / "runs" / "gpt2-tiny-lanton"
    info = run.info
    assert info["config"]["optimizer"]["lr"] is not None
    assert {"python", "torch", "transformers", "layerwise"} <= info["versions"].keys()
    assert len(info["corpus"]["sha256"]) == 64
    assert info["parameter_count"] == sum(math.prod(row["shape"]) for row in info["parameters"])
    assert [row["step"] for row in run.metrics] == [0, 2, 4, 5, 6, 8, 10, 12]
    assert [row["step"] for row in run.metrics if "val_loss" in row] == [0, 5, 10, 12]
    assert [row["step"] for row in run.layers] == [3, 6, 9, 12]
    units = {unit for row in info["parameters"] for unit in row["units"]}
    assert run.layers[-1]["layers"].keys() == units
    assert run.layers[-1]["layers"]["transformer.h.0.mlp.c_fc.weight"].keys() == {"squared_norm", "multiplier", "lr"}
    last = run.metrics[-1]
    assert last["tokens"] == run.result["tokens"] == 12 * 4 * 16
    assert last["val_loss"] == run.result["val_loss"]
    assert run.result["best_val_loss"] == min(run.series("val_loss").values)
    assert list((run.path / "tensorboard").iterdir())
    assert [path.name for path in list_checkpoints(run.path / "checkpoints")] == [
        "step-00000012",
        "step-00000008",
    ]
    assert "nan" not in (run.path / "layers.jsonl").read_text().lower()
    assert list(find_runs(tmp_path)) == [run.path]


def test_all_contenders_start_from_the_same_weights_and_validation_loss(tmp_path: Path) -> None:
    starts = {
        train(
            tiny_config(tmp_path, optimizer__name=name, training__steps=1, schedule__warmup_steps=0),
        ).metrics[0]["val_loss"]
        for name in ("adamw", "muon", "lanton")
    }
    assert len(starts) == 1


@pytest.mark.parametrize(("every", "recorded"), [(10, [4]), (3, [3, 4]), (2, [2, 4]), (0, [])])
def test_layer_rates_are_recorded_at_the_last_step_too(tmp_path: Path, every: int, recorded: list[int]) -> None:
    config = tiny_config(tmp_path, optimizer__name="lanton", training__steps=4, training__record_every=every)
    assert [row["step"] for row in train(config).layers] == recorded


def test_a_run_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    longer = len(train(tiny_config(tmp_path)).metrics)
    with pytest.raises(LayerwiseError, match=r"exists \(finished\): --resume"):
        train(tiny_config(tmp_path))
    shorter = train(tiny_config(tmp_path, training__steps=3), overwrite=True)
    assert shorter.metrics[-1]["step"] == 3
    assert len(shorter.metrics) < longer
    assert [path.name for path in list_checkpoints(shorter.path / "checkpoints")] == ["step-00000003"]


@pytest.mark.parametrize("name", ["adamw", "muon", "lanton"])
def test_too_large_a_rate_ends_as_diverged(tmp_path: Path, name: str) -> None:
    config = tiny_config(tmp_path, optimizer__name=name, optimizer__lr=1e30, training__clip_norm=None)
    run = train(config)
    assert run.status == "diverged"
    assert "step" in run.result["reason"]
    assert run.result["steps"] < 12
    assert json.loads((run.path / "run.json").read_text())["status"] == "diverged"
    assert train(config, resume=True).status == "diverged"  # not repeated


def test_bfloat16_trains_close_to_float32(tmp_path: Path) -> None:
    exact = train(tiny_config(tmp_path, run__name="a"))
    mixed = train(tiny_config(tmp_path, run__name="b", training__precision="bf16"))
    assert mixed.status == "finished"
    assert mixed.result["loss"] != exact.result["loss"]
    # bfloat16 keeps 8 bits: a relative 2**-8 in each product, and losses here are near 5.
    assert mixed.result["loss"] == pytest.approx(exact.result["loss"], rel=2**-6)
    assert all(value.dtype == torch.float32 for value in weights(mixed).values())


def test_independent_noise_takes_the_two_halves_of_the_batch(tmp_path: Path) -> None:
    noise = {"rule": "noise_adaptive", "reference": "independent"}
    changes: dict[str, Any] = {"optimizer__name": "lanton", "optimizer__rates": noise}
    with pytest.raises(LayerwiseError, match=r"training.accumulation=1 must be even"):
        train(tiny_config(tmp_path, run__name="odd", **changes))
    run = train(tiny_config(tmp_path, training__accumulation=2, **changes))
    assert run.status == "finished"
    assert min(rate["squared_norm"] for rate in run.layers[0]["layers"].values()) > 0


def test_noise_between_replicas_wants_several_processes(tmp_path: Path) -> None:
    noise = {"rule": "noise_adaptive", "reference": "replicas"}
    changes: dict[str, Any] = {"optimizer__name": "lanton", "optimizer__rates": noise}
    with pytest.raises(LayerwiseError, match=r"optimizer\.rates\.reference=replicas .* this run has one"):
        train(tiny_config(tmp_path, **changes))


class Watcher(Observer):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.moved: list[bool] = []

    def begin(self, trainer: Any, saved: Any) -> None:
        self.weight = next(trainer.model.parameters())

    @contextmanager
    def around_step(self, step: int) -> Iterator[None]:
        assert self.weight.grad is not None
        before = self.weight.detach().clone()
        yield
        self.moved.append(not torch.equal(before, self.weight))

    def after_step(self, step: int) -> None:
        self.steps.append(step)


def test_observers_stand_around_the_step(tmp_path: Path) -> None:
    watcher = Watcher()
    watched = train(tiny_config(tmp_path, run__name="a"), observers=[watcher])
    plain = train(tiny_config(tmp_path, run__name="b"))
    assert watcher.steps == list(range(1, 13))
    assert all(watcher.moved)
    assert all(torch.equal(value, weights(plain)[key]) for key, value in weights(watched).items())


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_schedules(name: Any) -> None:
    config = ScheduleConfig(name=name, warmup_steps=4, final_fraction=0.1, decay_fraction=0.25)
    values = [config.factor(step, 41) for step in range(41)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(values) == 1.0
    assert all(a >= b for a, b in pairwise(values[4:]))
    assert values[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    middle = {"constant": 1.0, "cosine": 0.55, "linear": 0.55, "wsd": 1.0}[name]
    assert values[22] == pytest.approx(middle)  # half way between 4 and 40


def test_progress_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train(tiny_config(tmp_path))
    lines = capsys.readouterr().err.splitlines()
    assert "step 12/12" in lines[-1]
    assert "tokens/s" in lines[-1]
    train(tiny_config(tmp_path), overwrite=True, progress=QuietProgress())
    assert capsys.readouterr().err == ""


def test_a_runs_records_are_read_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison asks of a hundred runs whether they have ended, and their layers are most of what they wrote."""
    with RunWriter(tmp_path / "run") as writer:
        writer.update(status="finished", name="x")
        writer.append("layers", {"step": 1, "layers": {}})
    monkeypatch.setattr(recorded, "read_lines", lambda _: pytest.fail("records were read"))
    assert has_ended(tmp_path / "run")
    assert read_run(tmp_path / "run").name == "x"


def test_reading_a_run_that_was_cut_short(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run") as writer:
        writer.update(status="running", name="x")
        writer.append("metrics", {"step": 1, "loss": math.nan})
        writer.append("metrics", {"step": 2, "loss": 3.0})
        with pytest.raises(LayerwiseError, match="another process"):
            RunWriter(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step":3,"lo')
    run = read_run(tmp_path / "run")
    assert run.metrics == [{"step": 1, "loss": None}, {"step": 2, "loss": 3.0}]
    assert [run.series("loss").steps.tolist(), run.series("loss").values.tolist()] == [[2.0], [3.0]]
    with pytest.raises(LayerwiseError, match=r"no run\.json there"):
        read_run(tmp_path)
    (tmp_path / "run" / "run.json").write_text('{"format": 1,')
    with pytest.raises(LayerwiseError, match="damaged"):
        read_run(tmp_path / "run")
