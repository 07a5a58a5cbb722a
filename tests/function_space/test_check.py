"""`check` tells which parametrisations do the same at every size, and reads what a few lines by hand read."""

from __future__ import annotations

import csv
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import layerwise as lw
from layerwise.function_space.checking.size_check import Trend, Value, trend
from layerwise.lab.report import style
from layerwise.lab.report.figures.size_slopes import size_slopes

SIZES = (32, 64, 128)
TEACHER = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Another one every step: inputs and the class that a linear teacher gives them."""
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(100 + step))
    return x, (x @ TEACHER).argmax(1)


class MLP(nn.Module):
    """Two hidden layers; the head starts with entries of 1/width, as muP has it, or of 1/sqrt(width)."""

    def __init__(self, width: int, head: float = 1.0) -> None:
        super().__init__()
        self.first, self.hidden, self.head = (
            nn.Linear(16, width),
            nn.Linear(width, width),
            nn.Linear(width, 8),
        )
        for layer, power in ((self.first, 0.5), (self.hidden, 0.5), (self.head, head)):
            nn.init.normal_(layer.weight, std=layer.in_features**-power)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.first(x).relu()).relu())


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-3)


def one_over_width(model: MLP) -> torch.optim.Optimizer:
    """muP's rule for Adam: 1/width for what is multiplied by a width, a constant for the rest."""
    wide = [model.hidden.weight, model.head.weight]
    rest = [p for p in model.parameters() if all(p is not w for w in wide)]
    return torch.optim.Adam([{"params": wide, "lr": 1e-3 * 32 / model.hidden.in_features}, {"params": rest}], lr=1e-3)


@pytest.fixture(scope="module")
def checked() -> dict[str, lw.SizeCheck]:
    def result(optimizer: Any, **options: Any) -> lw.SizeCheck:
        return lw.check(MLP, SIZES, optimizer, batch, (1, 5), seeds=(0, 1, 2), **options)

    return {
        "plain": result(plain, probes=40),
        "1/width": result(one_over_width, method="exact"),  # slopes of 0.3, next to which 40 probes are noise
        "flerm": result(plain, probes=40, match="first"),
        "uniform": result(lambda m: torch.optim.Adam(m.parameters(), 0.1), probes=40, match="uniform"),
    }


def test_plain_adam_grows_with_the_width_and_the_others_are_flat(checked):
    assert {name: result.passed for name, result in checked.items()} == {
        "plain": False, "1/width": True, "flerm": True, "uniform": True,
    }  # fmt: skip
    assert checked["plain"].verdicts["hidden"] == "grows"
    [first, _] = [t for t in checked["plain"].of("rate") if t.module == "hidden"]
    # Each of Adam's first entries is +-lr: what a hidden layer puts out moves with its fan-in, as far as the new inputs
    # are like those of the gradient, and with its root as far as they are not.
    assert 0.4 < first.slope < 1.1


def test_mups_own_quantity_tells_the_same_story(checked):
    coordinates = {name: result.judging("activation_change") for name, result in checked.items()}
    assert not coordinates["plain"].passed
    assert coordinates["1/width"].passed
    [first, _] = [t for t in coordinates["plain"].of("activation_change") if t.module == "hidden"]
    assert 0.4 < first.slope < 1.1


def test_quantities_are_those_by_hand(checked):
    def run(width: int) -> dict[str, float]:
        torch.manual_seed(0)
        model = MLP(width)
        # The batch that is measured on comes after the five of training and the one that is matched on.
        optimizer, (x, y), measured = plain(model), batch(0), batch(6)[0]
        start = model.first(measured)
        before = [p.detach().clone() for p in model.hidden.parameters()]
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        weight, bias = (p.detach() - old for p, old in zip(model.hidden.parameters(), before, strict=True))
        end = model.first(measured)
        return {
            "activation": end.square().mean().sqrt().item(),
            "activation_change": (end - start).square().mean().sqrt().item(),
            "spectral": torch.linalg.matrix_norm(weight, 2).item(),
            "update_rms": torch.cat([weight.flatten(), bias]).square().mean().sqrt().item(),
        }

    result = lw.check(MLP, SIZES, plain, batch, (1, 5), seeds=(0,), probes=4)
    for index, size in enumerate(SIZES):
        for quantity, expected in run(size).items():
            module = "hidden" if quantity in ("spectral", "update_rms") else "first"
            [found] = [t for t in result.of(quantity, 1) if t.module == module]
            # Adam's entries are +-lr but for its eps; 16 products leave some per cent of a spectral norm of signs.
            assert found.values[index] == pytest.approx(expected, rel=0.03 if quantity == "spectral" else 1e-3)


def test_a_check_leaves_the_random_state_alone_and_repeats_itself():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = lw.check(MLP, (8, 16), plain, batch, (1,), probes=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert one == lw.check(MLP, (8, 16), plain, batch, (1,), probes=4)


def test_blocks_of_deeper_models_are_one_stack():
    class Deep(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
            self.head = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x.relu()) / len(self.blocks) ** 0.5
            return self.head(x)

    result = lw.check(Deep, (2, 4, 8), plain, batch, (1,), axis="depth", probes=40)
    assert set(result.verdicts) == {"blocks.*", "head"}
    [stack] = [t for t in result.of("rate") if t.module == "blocks.*"]
    # 2, 4, 8 layers of equal steps on branches divided by sqrt(depth): the sum of their rates grows with sqrt(depth).
    assert stack.slope == pytest.approx(0.5, abs=0.2)
    # A depth map shares the first size's rate among the blocks: flat again.
    options = {"axis": "depth", "probes": 40, "match": "first", "depth": {"blocks.*": "split"}}
    matched = lw.check(Deep, (2, 4, 8), plain, batch, (1,), **options)
    assert matched.verdicts == {"blocks.*": "flat", "head": "flat"}


def test_batches_and_losses_are_what_users_have():
    class Named(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.net = MLP(width)

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            logits = self.net(x)
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    x, y = batch(0)
    keywords = {"x": x, "labels": y}
    one = lw.check(MLP, (8, 16), plain, (x, y), (1,), probes=4)
    slopes = [trend.slope for trend in one.of("rate")]
    for loss in (None, lambda model, given: model(**given)["loss"]):
        other = lw.check(Named, (8, 16), plain, keywords, (1,), probes=4, loss=loss)
        assert [trend.slope for trend in other.of("rate")] == slopes
    loader = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=32)
    assert lw.check(MLP, (8, 16), plain, loader, (1,), probes=4) == one
    regression = lw.check(MLP, (8, 16), plain, (x, x[:, :8]), (1,), probes=4)
    assert regression.verdicts


def test_a_model_that_returns_its_logits_and_a_loss_is_checked_as_it_is():
    """As nanoGPT does, which needed both `loss=` and `forward=`."""

    class Both(MLP):
        def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
            logits = super().forward(x)
            return logits, None if targets is None else functional.cross_entropy(logits, targets)

    x, y = batch(0)
    expected = lw.check(MLP, (8, 16), plain, (x, y), (1,), probes=4)
    for given_ in ((x, y), {"x": x, "targets": y}):
        found = lw.check(Both, (8, 16), plain, given_, (1,), probes=4)
        assert [trend.slope for trend in found.of("rate")] == [trend.slope for trend in expected.of("rate")]


@pytest.mark.parametrize("sizes", [(8, 16), (16, 8)])
def test_a_run_that_diverges_does_not_pass(sizes):
    """NaN was taken for a rate of next to nothing, which no one judges."""

    def too_fast(model):
        return torch.optim.SGD(model.parameters(), 1e20 if model.first.out_features == 16 else 1e-3)

    result = lw.check(MLP, sizes, too_fast, batch, steps=(1, 4), seeds=(0,))
    assert not result.passed
    assert {abs(t.slope) for t in result.of("rate", 4)} == {math.inf}


def test_results_are_printed_and_saved(checked, tmp_path):
    text = str(checked["plain"])
    assert text.splitlines()[0].split() == ["module", "step", "1", "step", "5"]
    assert "hidden" in text
    assert "grows" in text
    assert "function-space rate against log width (32, 64, 128)" in text
    checked["plain"].save(tmp_path / "check.csv")
    with pytest.raises(lw.LayerwiseError, match="cannot be written"):
        checked["plain"].save(tmp_path / "none" / "check.csv")
    rows = list(csv.DictReader((tmp_path / "check.csv").open()))
    assert len(rows) == 3 * 2 * 3 * 5  # modules, steps, sizes, quantities
    assert rows[0].keys() >= {
        "module",
        "quantity",
        "step",
        "width",
        "value",
        "slope",
        "slope_stderr",
        "verdict",
    }


def test_ticks_of_the_figure_are_numbers_and_no_markup(checked):
    with style.styled():
        figure = size_slopes(checked["plain"])
        figure.canvas.draw()
        axes = figure.axes[0]
        ticks = [tick.get_text() for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_ticklabels()]
    assert len(ticks) >= 4
    assert all(float(tick) > 0 for tick in ticks)
    assert ticks[:3] == ["32", "64", "128"]  # the sizes that were measured
    assert figure.axes[-1].get_legend().get_title().get_text() == f"slope at step {checked['plain'].steps[-1]}"


def test_what_cannot_be_checked_is_refused():
    for options, message in (
        ({"sizes": (8,)}, "give at least two different ones"),
        ({"steps": (0, 1)}, "give numbers from 1 on"),
        ({"seeds": (0, 0)}, "each once"),
        ({"judge": "loss"}, r"judge='loss'\): give 'rate' or 'activation'"),
        ({"batch": []}, "batch yields nothing"),
        ({"batch": 3}, "batch is int"),
        ({"make_model": lambda size: size}, r"make_model\(8\) returned int"),
        ({"make_model": MLP(8)}, "make_model=MLP failed .*it is called with a size, as lambda width"),
        ({"make_model": dict.fromkeys((8, 16), MLP(8)).get}, "returned a model that it had returned before: make a new one"),
        ({"sizes": (8, 16, 8)}, r"sizes \[8, 16, 8\]: give at least two different ones above 0, each once"),
        ({"make_model": lambda size: MLP(8)}, "make_model makes one model at sizes 8 and 16: have it use its argument"),
        ({"make_optimizer": torch.optim.SGD}, r"make_optimizer=SGD failed .*called with the model, as lambda model: "),
        ({"forward": lambda x: x}, "too many positional arguments.*called with the model and the inputs"),
        ({"loss": functional.cross_entropy}, "loss=cross_entropy failed .*called with the model and a batch; .*loss=lambda"),
        ({"loss": nn.CrossEntropyLoss()}, "loss=CrossEntropyLoss failed .*called with the model and a batch"),
        ({"loss": functional.mse_loss}, "loss=mse_loss failed .*called with the model and a batch"),
        ({"loss": lambda model, x, y: model(x)}, "failed .*missing 1 required.*called with the model and a batch"),
        ({"loss": lambda model, given: model(given[0])}, r"loss= returned a tensor of shape \(32, 8\): return one number"),
        ({"loss": lambda model, given: 1.0}, "loss= returned float: return one number"),
        ({"batch": (torch.ones(4, 16), torch.ones(4, 3, dtype=torch.long))}, r"\(4, 8\), the targets \(4, 3\): give loss="),
        ({"batch": (torch.ones(4, 16), torch.ones(4, 3))}, r"\(4, 8\), the targets \(4, 3\): give loss="),
        ({"batch": {"x": torch.ones(4, 16)}}, "no loss for a batch of type dict: give loss="),
        ({"batch": torch.ones(4, 16)}, "no loss for a batch of type Tensor: give loss="),
    ):
        given_ = {"make_model": MLP, "sizes": (8, 16), "make_optimizer": plain, "batch": batch, "steps": (1,)}
        with pytest.raises(lw.LayerwiseError, match=message):
            lw.check(**{**given_, **options})


# --------------------------------------------------------------------------------------------------------- slopes


@settings(max_examples=50)
@given(
    st.floats(-2, 2),
    st.floats(1e-6, 1e6),
    st.lists(st.integers(1, 4096), min_size=2, max_size=6, unique=True),
)
def test_a_power_law_has_its_exponent_as_slope(power, factor, sizes):
    found = trend("m", "rate", 1, sizes, [[Value(factor * size**power, 0.0)] for size in sizes])
    assert found.slope == pytest.approx(power, abs=1e-6)
    assert found.stderr == 0


def test_slopes_know_their_error():
    """The 95 % interval holds the truth in about 95 % of draws, with three seeds and with known errors alike."""
    generator = torch.Generator().manual_seed(0)
    sizes = (64, 128, 256)
    for seeds in (1, 3):
        held = 0
        for _ in range(400):
            noise = 0.1 * torch.randn(3, seeds, generator=generator)
            found = trend(
                "m", "rate", 1, sizes,
                [[Value(math.exp(x), 0.1 * math.exp(x)) for x in row] for row in noise.tolist()],
            )  # fmt: skip
            held += abs(found.slope) <= found.margin
        assert 0.91 < held / 400 < 0.985  # 3 standard deviations of a binomial around 0.95


def test_verdicts():
    def of(slope: float | None, stderr: float = 0.0) -> str:
        return Trend("m", "rate", 1, (1, 2), (1, 1), slope, stderr).verdict(0.2)

    assert of(0.1) == of(-0.2) == "flat"
    assert of(0.3) == "grows"
    assert of(-0.3) == "shrinks"
    assert of(0.3, 0.1) == "unclear"
    assert of(0.1, 0.2) == "flat"  # 0.1 +- 0.392
    assert of(0.1, 0.21) == of(-0.1, 3.0) == "unclear"  # 1/2 is in the interval
    assert of(0.5, 0.1) == of(math.inf) == "grows"
    assert of(None) == "none"
    zero, appears = ([Value(0.0)], [Value(0.0)]), ([Value(0.0)], [Value(1.0)])
    assert trend("m", "rate", 1, (1, 2), zero).verdict(0.2) == "none"
    assert trend("m", "rate", 1, (1, 2), appears).verdict(0.2) == "grows"
