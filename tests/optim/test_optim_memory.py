"""The table of docs/optimizers.md: bytes of state per entry and per unit, of every preset and option."""

import re
from pathlib import Path

import pytest
import torch
from tiny import Net

import layerwise as lw

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
RULES = {
    "rates=None": lambda: None,
    "StaticRates": lambda: lw.StaticRates({"up.weight": 0.5}),
    "NormAdaptive": lw.NormAdaptive,
    "DualNormAdaptive": lw.DualNormAdaptive,
    **{
        reference: lambda reference=reference: lw.NoiseAdaptive(reference=reference)
        for reference in ("previous", "previous_bf16", "momentum", "independent", "replicas")
    },
}


def rows():
    table = PAGE.read_text(encoding="utf-8").split("## Memory")[1]
    found = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in table.splitlines() if line.startswith("|")]
    return [tuple(row) for row in found[2:]]


def cases():
    for what, group, *sizes in rows():
        first, _, option = what.partition(", ")
        presets, rule = ([first], option) if first == "Lanton" else (what.split(", "), None)
        for preset in presets:
            yield pytest.param(preset, rule, group, *map(int, sizes), id=f"{preset}-{rule}-{group}")


def test_the_table_has_every_preset_and_rule():
    named = " ".join(row[0] for row in rows())
    for name in ("Muon", "DMuon", "DualMuon", "Scion", "Signum", *RULES):
        assert name in named


@pytest.mark.parametrize(("preset", "rule", "which", "float32", "bfloat16", "per_unit"), list(cases()))
def test_bytes_of_state(preset, rule, which, float32, bfloat16, per_unit):
    for dtype, per_entry in ((torch.float32, float32), (torch.bfloat16, bfloat16)):
        model = Net().to(dtype)
        options = {"rates": RULES[rule]()} if rule else {}
        optimizer = getattr(lw, preset)(lw.param_groups(model), **options)
        update = {"matrices": ["lmo"], "AdamW": ["adamw"], "all": ["lmo"]}[which]
        groups = [group for group in optimizer.param_groups if repr(group["update"]) in update]
        assert which != "all" or len(groups) == len(optimizer.param_groups)
        params = [p for group in groups for p in group["params"]]  # each is one unit in this model
        held = sum(v.nbytes for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
        assert held == per_entry * sum(p.numel() for p in params) + per_unit * len(params)
