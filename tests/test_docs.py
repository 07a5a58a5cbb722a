"""The Python of README.md and of the pages runs as it stands, beside a model of our own, and prints what the pages say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerwise as lw

ROOT = Path(__file__).parent.parent
#: A block of Python, and the block of output that may follow it.
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```\n(.*?)```)?", flags=re.DOTALL)


class Decoder(nn.Module):
    """Blocks of one matrix between an embedding and a head."""

    def __init__(self, width: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def with_adam(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def given() -> dict[str, Any]:
    """What the pages take for given: their reader's models, optimizers and batches."""
    torch.manual_seed(0)
    batch = torch.randint(11, (4, 6))
    model, optimizer = with_adam(Decoder())
    loss_of(model, batch).backward()
    return {
        "torch": torch, "lw": lw, "model": model, "optimizer": optimizer, "loss": loss_of, "rate": 1e-3,
        "batch": batch, "other_batch": batch, "inputs": batch, "batches": [(batch, batch)], "loader": [(batch, batch)],
        "update": {name: 1e-3 * p.sign() for name, p in model.named_parameters()}, "small": model, "large": Decoder(16),
        "small_optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
    }  # fmt: skip


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """What the block of the page on watching leaves behind, after 20 batches."""
    monkeypatch.chdir(tmp_path)
    names = given()
    names |= {"optimizer": lw.DualMuon(lw.param_groups(names["model"], names["batch"])), "batches": [names["batch"]] * 20}
    exec(block("docs/watching.md", "watch = ")[0], names)
    return names


def block(page: str, start: str) -> tuple[str, str | None]:
    """A block of a page by its first words, and the output below it."""
    (found,) = [match for match in BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")) if match[1].startswith(start)]
    return found[1], found[2]


@pytest.mark.parametrize(
    ("page", "start"),
    [
        ("README.md", "factors = "),
        ("README.md", "rates = lw.function_space_rates"),
        ("docs/fixed-rates.md", "factors = "),
        ("docs/fixed-rates.md", "groups = "),
        ("docs/function-space.md", "recorder = "),
        ("docs/function-space.md", "rates = "),
        ("docs/polar.md", "exact = "),
        ("docs/roles.md", "print(lw.describe"),
    ],
)
def test_a_block_runs(page, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block(page, start)[0], given())


def test_a_loop_of_the_readers_own():
    code, table = block("docs/optimizers.md", "optimizer = ")
    names = given()
    names["loss"] = loss_of(names["model"], names["batch"])
    exec(code, names)
    assert table.splitlines()[0].split() == names["optimizer"].groups_table().splitlines()[0].split()


def test_a_record_of_a_watch_has_the_columns_that_the_page_explains(watched):
    _, table = block("docs/watching.md", "watch = ")
    printed = str(watched["watch"].records[-1]).splitlines()
    assert [line.split()[0] for line in printed] == [line.split()[0] for line in table.splitlines()]
    assert printed[1].split() == table.splitlines()[1].split()
    assert Path("watch.jsonl").read_text().count("\n") == 3


def test_a_picture_of_the_layers_rates(watched):
    exec(block("docs/watching.md", "axes = lw.plot_watch")[0], watched)
    assert Path("rates.png").exists()


def test_the_check_of_the_page_comes_out_as_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, table = block("docs/watching.md", "def make_model")
    names = given()
    exec(code.replace("(1, 10, 100)", "(1,)"), names)
    rows = [line.split() for line in table.splitlines()[1:-1]]
    assert names["result"].verdicts == {row[0]: row[-1] for row in rows}
    slopes = [trend.slope for trend in names["result"].of("rate", 1)]
    assert slopes == pytest.approx([float(row[1]) for row in rows], abs=0.02)  # the page has two digits
    assert "False" in capsys.readouterr().out


def test_what_the_page_on_the_code_names_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = re.findall(r"`(\w+)` in `([\w/]+\.py)`", page)
    assert len(places) > 8
    for name, path in places:
        assert re.search(rf"(def|class) {name}\b", (ROOT / "src" / "layerwise" / path).read_text(encoding="utf-8")), path


def test_rates_carried_to_a_large_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = given()
    names["large"], names["optimizer"] = with_adam(names["large"])
    exec(block("docs/transfer.md", "recorder = ")[0], names)
    assert names["flerm"].learning_rates().keys() == dict(names["large"].named_parameters()).keys()

    names["large"], names["optimizer"] = with_adam(Decoder(16))
    others = block("docs/transfer.md", "flerm = ")[0]
    exec(re.sub(r"(?m)^match = .*$", "", others), names)  # match_lora needs peft: examples/lora_rank.py
    rates = {p: group["lr"] for group in names["optimizer"].param_groups for p in group["params"]}
    large = names["large"]  # twice as wide
    assert rates[large.blocks[1].weight] == rates[large.head.weight] == 1e-3 / 2
    assert rates[large.embed.weight] == rates[large.head.bias] == 1e-3


def test_rates_carried_to_more_blocks(tmp_path, monkeypatch):
    def small(seed):
        torch.manual_seed(seed)
        return with_adam(Decoder())

    monkeypatch.chdir(tmp_path)
    names = given() | {"small": small}
    names["model"], names["optimizer"] = with_adam(Decoder(16, blocks=4))
    exec(block("docs/function-space.md", "def run(seed)")[0], names)
    assert names["flerm"].reports


def test_rates_are_printed_as_the_page_has_them(capsys):
    code, table = block("docs/function-space.md", "torch.manual_seed(0)")
    exec(code, given())
    numbers = [re.findall(r"(?<![\w.])\d+\.\d+(?:e-\d+)?", said) for said in (capsys.readouterr().out, table)]
    printed, shown = (torch.tensor([float(n) for n in row]) for row in numbers)
    # float32 sums in another order move the last of the printed digits; `stderr` has two
    torch.testing.assert_close(printed, shown, rtol=0.05, atol=0)
