"""What trainers log of layer rates: means by role and block, chosen units, never more than a bound."""

import math
import statistics
import warnings
from typing import get_args

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.integrations.logged import MOST_NAMES, Level, RateLog


class Blocks(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(count))
        self.head = nn.Linear(4, 5)


def stepped(count=2):
    torch.manual_seed(0)
    model = Blocks(count)
    optimizer = lw.Lanton(lw.param_groups(model, overrides={"head.weight": {"role": "head"}}))
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def test_by_default_they_are_means_over_the_units_of_one_role_in_one_block():
    optimizer = stepped()
    logged, rates = RateLog()(optimizer), optimizer.layer_rates()
    assert {key for key in logged if key.startswith("layer_lr/")} == {
        "layer_lr/embedding",
        "layer_lr/layers.0/hidden",
        "layer_lr/layers.0/vector",
        "layer_lr/layers.1/hidden",
        "layer_lr/layers.1/vector",
        "layer_lr/head",
        "layer_lr/vector",
    }
    pair = [rates["layers.1.0.weight"], rates["layers.1.1.weight"]]
    assert logged["layer_lr/layers.1/hidden"] == pytest.approx(statistics.mean(r.lr for r in pair))
    assert logged["layer_squared_norm/layers.1/hidden"] == pytest.approx(statistics.mean(r.squared_norm for r in pair))


@pytest.mark.parametrize("by", get_args(Level))
def test_every_level_has_the_mean_of_all_units_in_it(by):
    optimizer = stepped()
    logged, rates = RateLog(by)(optimizer), optimizer.layer_rates()
    lrs = [value for key, value in logged.items() if key.startswith("layer_lr/")]
    assert min(r.lr for r in rates.values()) <= min(lrs) <= max(lrs) <= max(r.lr for r in rates.values())
    assert len(lrs) == {"unit": len(rates), "role and block": 7, "block": 3, "role": 4}[by]
    assert not any(map(math.isnan, logged.values()))


def test_a_filter_leaves_the_others_out_and_says_where_it_matches_nothing():
    optimizer = stepped()
    assert set(RateLog("unit", "layers.1.*.weight")(optimizer)) == {
        f"layer_{kind}/layers.1.{i}.weight" for kind in ("lr", "squared_norm") for i in (0, 1)
    }
    assert len(RateLog("role", ["head.*", "embed.*"])(optimizer)) == 6
    with pytest.raises(lw.LayerwiseError, match=r"matches no unit, such as 'embed.weight'"):
        RateLog(only="haed.*")(optimizer)


def test_a_step_never_logs_more_names_than_the_bound_and_says_once_that_it_takes_coarser_ones():
    optimizer = stepped(MOST_NAMES // 4 + 1)  # 4 units, 2 names of role and block in each block
    log = RateLog("unit")
    with pytest.warns(UserWarning, match=f"{MOST_NAMES} are logged at most"):
        logged = log(optimizer)
    assert "layer_lr/layers.7/hidden" in logged
    assert sum(key.startswith("layer_lr/") for key in logged) <= MOST_NAMES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert log(optimizer) == logged
        RateLog()(optimizer)


def test_another_level_is_refused():
    with pytest.raises(lw.LayerwiseError, match=r"by='layer'.*'role and block'"):
        RateLog("layer")
