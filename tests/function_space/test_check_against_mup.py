"""`check` beside microsoft/mup's own coordinate check, on the MLP of its README: the two tell the same story.

mup asks for torchvision, which it does not import: `make setup` installs it without; pandas and pyyaml are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import layerwise as lw

mup = pytest.importorskip("mup", reason="pip install --no-deps mup==1.0.0")
coord_check = pytest.importorskip("mup.coord_check", reason="needs pandas")

SIZES = (32, 64, 128, 256)
LR = 1e-2
TEACHER = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class MLP(nn.Module):
    def __init__(self, width: int, head: type[nn.Linear]) -> None:
        super().__init__()
        self.first, self.hidden = nn.Linear(16, width, bias=False), nn.Linear(width, width, bias=False)
        self.head = head(width, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.first(x).relu()).relu())


def standard(width: int) -> nn.Module:
    return MLP(width, nn.Linear)


def mu_p(width: int) -> nn.Module:
    model = MLP(width, mup.MuReadout)
    mup.set_base_shapes(model, MLP(32, mup.MuReadout), delta=MLP(64, mup.MuReadout))
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
    return x, (x @ TEACHER).argmax(1)


def mups_slope(make: Callable[[int], nn.Module], is_mup: bool) -> dict[str, float]:
    """Of the log of mup's coordinates (mean absolute activation) at its fourth step against that of the width."""
    models = {width: (lambda width=width: make(width)) for width in SIZES}
    table = coord_check.get_coord_data(
        models,
        [batch(0)],
        optimizer="adam",
        mup=is_mup,
        lr=LR,
        nsteps=4,
        nseeds=3,
        cuda=False,
        show_progress=False,
    )
    table = table[(table.t == 4) & table.module.isin(["first", "hidden", "head"])]
    means = table.groupby(["module", "width"]).l1.mean().map(math.log)
    span = math.log(SIZES[-1] / SIZES[0])
    return {module: (means[module, SIZES[-1]] - means[module, SIZES[0]]) / span for module in ("first", "hidden", "head")}


def test_both_say_that_standard_adam_grows_and_mup_does_not():
    theirs = {"standard": mups_slope(standard, False), "muP": mups_slope(mu_p, True)}
    ours = {
        "standard": lw.check(
            standard, SIZES, lambda m: torch.optim.Adam(m.parameters(), LR), batch, (1, 4), seeds=(0, 1, 2)
        ),
        "muP": lw.check(mu_p, SIZES, lambda m: mup.MuAdam(m.parameters(), lr=LR), batch, (1, 4), seeds=(0, 1, 2)),
    }
    assert max(theirs["standard"].values()) > 0.3
    # mup's README: coordinates of wider models stay, but for outputs, which may start smaller.
    assert max(theirs["muP"].values()) < 0.2
    for judge in ("rate", "activation_change"):
        judged = {name: check.judging(judge) for name, check in ours.items()}
        assert judged["standard"].verdicts["hidden"] == judged["standard"].verdicts["head"] == "grows"
        assert "grows" not in judged["muP"].verdicts.values(), str(judged["muP"])


def test_width_factors_and_mups_initialisation_are_mup():
    """Number by number; with torch's initialisation, whose head is too large, the first steps grow with the width."""

    def smaller_head(width: int) -> nn.Module:
        model = standard(width)
        with torch.no_grad():
            model.head.weight.mul_((32 / width) ** 0.5)
        return model

    def rates(model: nn.Module) -> torch.optim.Optimizer:
        inputs, _ = batch(0)
        factors = lw.width_factors(model, standard(32), inputs)
        return torch.optim.Adam(lw.torch_groups(lw.param_groups(model, inputs, factors=factors), LR), weight_decay=0.0)

    ours, half = (lw.check(make, SIZES, rates, batch, (1, 4)) for make in (smaller_head, standard))
    theirs = lw.check(mu_p, SIZES, lambda m: mup.MuAdam(m.parameters(), lr=LR), batch, (1, 4))
    ours, half, theirs = ([trend.slope for trend in check.of("rate")] for check in (ours, half, theirs))
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert max(ours) < 0.1
    assert max(half) > 0.3
