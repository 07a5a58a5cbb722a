"""Probes on slices of the batch: the same means, batches that cannot be cut, and what is asked for and cannot be."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import nn

from layerwise.errors import LayerwiseError
from layerwise.function_space import function_space_rates
from layerwise.function_space.measuring import linear_products, measurement
from layerwise.function_space.measuring.runners import Runner
from layerwise.function_space.measuring.slices import cut


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, {name: torch.randn_like(p) for name, p in model.named_parameters()}


def all_signs(outputs, count, seed, first_probe, first_row):
    """Every sign vector on the entries that count, over and over: means over them are exact expectations."""
    counted = torch.ones_like(outputs.values) if outputs.mask is None else outputs.mask.to(outputs.values)
    counted = counted.bool().reshape(outputs.slices, *outputs.values.shape[outputs.slices > 1 :])
    each = [itertools.cycle(itertools.product([-1.0, 1.0], repeat=int(part.sum()))) for part in counted]
    for signs in itertools.islice(zip(*each, strict=True), count):
        probe = torch.zeros_like(counted, dtype=outputs.values.dtype)
        probe[counted] = torch.tensor([sign for part in signs for sign in part], dtype=probe.dtype)
        yield probe.reshape(outputs.values.shape)


@pytest.mark.parametrize("method", ["kronecker", "full_cov", "iid"])
def test_expectations_are_those_of_the_whole_batch(method, monkeypatch):
    """All sign vectors of 6 entries against all of 4 and of 2: moments are quadratic in the probe, so this is exact.

    One of the four examples is padding, so that the slices count differently.
    """
    monkeypatch.setattr(measurement, "draw_probes", all_signs)
    model, update = network()
    x, mask = torch.randn(4, 3).double(), torch.tensor([1, 1, 1, 0])
    whole = function_space_rates(model, update, x, method=method, probes=128, mask=mask, slices=1)
    sliced = function_space_rates(model, update, x, method=method, probes=128, mask=mask, slices=2)
    assert sliced.entries == whole.entries == 6
    assert sliced.probes == whole.probes
    for name in whole:
        # Float64 rounding over a few hundred terms.
        assert sliced[name].value == pytest.approx(whole[name].value, rel=1e-12)
    unweighted = [
        function_space_rates(model, update, x[a:b], method=method, probes=16, mask=mask[a:b], slices=1)
        for a, b in ((0, 2), (2, 4))
    ]
    naive = sum(part["0.weight"].value ** 2 for part in unweighted) / 2
    assert naive**0.5 != pytest.approx(whole["0.weight"].value, rel=1e-3)


def test_uneven_shares_of_probes_do_not_weigh_batches(monkeypatch):
    """Batches of equal weight at 3 and 2 probes each: every sign gives the same moment of one output entry."""
    monkeypatch.setattr(measurement, "draw_probes", all_signs)
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    batches = [torch.randn(1, 3).double() for _ in range(2)]
    exact = function_space_rates(model, update, batches, method="exact")
    found = function_space_rates(model, update, batches, method="full_cov", probes=5)
    assert found["weight"].value == pytest.approx(exact["weight"].value, rel=1e-12)


class Sizes:
    """A forward that notes how many examples it was given with a graph to build."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def __call__(self, model, inputs):
        outputs = self.function(model, inputs)
        if torch.is_grad_enabled():
            self.seen.append(len(outputs))
        return outputs


@pytest.mark.parametrize(
    ("inputs", "function"),
    [
        (lambda x: x, lambda m, x: m(x)),
        (lambda x: (x, 2 * x, None), lambda m, xs: m(xs[0] + xs[1])),
        (lambda x: Pair(x, 2 * x), lambda m, xs: m(xs.first + xs.second)),
        (lambda x: {"x": x, "y": [x, 3.0]}, lambda m, xs: m(xs["x"] + xs["y"][0] * xs["y"][1])),
    ],
)
def test_tensors_tuples_and_mappings_are_cut(inputs, function):
    model, update = network()
    x = torch.randn(7, 3).double()
    forward = Sizes(function)
    found = function_space_rates(model, update, inputs(x), forward, "full_cov", 400, slices=3)
    assert forward.seen == [2, 2, 3]
    exact = function_space_rates(model, update, inputs(x), function, "exact")
    for name in exact:  # four intervals of 4 standard errors
        assert abs(found[name].value - exact[name].value) < 4 * found[name].stderr


def test_as_many_slices_as_leave_four_probes_for_each_and_eight_of_fewer_probes():
    x = torch.randn(20, 3)
    counts = [len(cut(x, None, probes, "auto") or [x]) for probes in (1, 2, 8, 31, 36, 64, 200)]
    assert counts == [1, 2, 8, 8, 9, 16, 20]


class TimeFirst(nn.Module):
    """Looks like a batch of examples and is not: each entry of the leading dimension sees those before it."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 2)

    def forward(self, x):
        return self.lstm(x[:, None])[0]


class FaintlyMixed(nn.Module):
    """A residual branch over the mean of the batch, which moves outputs by a per cent and is all there is to its weight."""

    def __init__(self):
        super().__init__()
        self.first, self.mixed = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        x = self.first(x)
        return x + 0.01 * self.mixed(x.mean(0))


@pytest.mark.parametrize("slices", [2, 6])
@pytest.mark.parametrize(
    "case", ["batch statistics", "time first", "mean over examples", "faint branch", "whole batches only"]
)
def test_examples_that_depend_on_one_another_are_measured_together(case, slices):
    torch.manual_seed(0)
    options, forward = {}, None
    model = nn.Sequential(nn.Linear(3, 2))
    if case == "batch statistics":
        model.append(nn.BatchNorm1d(2))
        options = {"batch_norm": "batch"}
    elif case == "time first":
        model = TimeFirst()
    elif case == "faint branch":
        model = FaintlyMixed()
    elif case == "mean over examples":
        forward = lambda m, x: m(x).mean(0)  # noqa: E731
    else:
        forward = lambda m, x: m(x.reshape(6, 3))  # noqa: E731
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    x = torch.randn(6, 3)
    whole = function_space_rates(model, update, x, forward, slices=1, **options)
    assert function_space_rates(model, update, x, forward, **options) == whole
    with pytest.raises(LayerwiseError, match="depend on the other examples") as error:
        function_space_rates(model, update, x, forward, slices=slices, **options)
    assert "\n" not in str(error.value)


def test_slices_of_padding_alone_are_passed_over():
    model, update = network()
    x = torch.randn(4, 3).double()
    found = function_space_rates(model, update, x, mask=torch.tensor([0, 1, 1, 0]), probes=32, slices=4)
    assert found.entries == 4
    assert found.probes == 16  # those of the two slices that count
    with pytest.raises(LayerwiseError, match="no output entry"):
        function_space_rates(model, update, x, mask=torch.zeros(4), slices=4)


def test_slices_that_cannot_be_had_are_refused():
    model, update = network()
    x = torch.randn(4, 3).double()
    for inputs, options, text in [
        (x, {"slices": 5}, "4 at most"),
        (x, {"slices": 4, "probes": 3}, "3 at most"),
        (x, {"slices": 0}, "slices=0"),
        (x, {"slices": "many"}, "'many'"),
        ((x, x[:2]), {"slices": 2}, "share their leading dimension"),
        (x, {"slices": 2, "mask": torch.ones(())}, "share their leading dimension"),
    ]:
        with pytest.raises(LayerwiseError, match=text):
            function_space_rates(model, update, inputs, **options)


class Decoder(nn.Module):
    """Weights of every kind: an embedding tied to the head, positions, attention, gains, and a matrix used twice."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(11, 8), nn.Embedding(5, 8)
        self.norm, self.gain = nn.LayerNorm(8), nn.Parameter(torch.ones(8))
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.twice = nn.Linear(8, 8)

    def forward(self, x):
        x = self.words(x) + self.positions(torch.arange(x.shape[1]))
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2)) * self.gain
        return nn.functional.linear(self.twice(self.twice(x).tanh()), self.words.weight)


def decoder():
    torch.manual_seed(0)
    model = Decoder().double()
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    return model, update, torch.randint(0, 11, (7, 5))


@pytest.mark.parametrize("method", ["kronecker", "full_cov", "iid"])
@pytest.mark.parametrize("masked", [False, True])
def test_slices_side_by_side_have_the_rates_of_slices_one_by_one(method, masked, monkeypatch):
    model, update, x = decoder()
    mask = torch.arange(5) < torch.randint(1, 6, (7, 1)) if masked else None
    ran = []
    plain = Runner.side_by_side
    monkeypatch.setattr(Runner, "side_by_side", lambda *a: ran.append(plain(*a)) or ran[-1])
    options = {"method": method, "probes": 12, "slices": 6, "mask": mask}
    together = function_space_rates(model, update, x, **options)
    assert [outputs.values.shape[:2] for outputs in ran] == [(5, 1)]  # the sixth has two examples
    alone = function_space_rates(model, update, x, memory=0, **options)
    assert len(ran) == 1
    assert together.entries == alone.entries
    for name in alone:  # the same sums in another order, in float64
        assert together[name].value == pytest.approx(alone[name].value, rel=1e-10), name
        # The error hangs on single sums near 0, which keep fewer digits.
        assert together[name].stderr == pytest.approx(alone[name].stderr, rel=1e-6), name


@pytest.mark.parametrize(
    "why",
    ["looks at numbers", "asks for the graph", "random numbers", "one slice is padding", "torch changed"],
)
def test_what_does_not_run_side_by_side_runs_one_by_one(why, monkeypatch):
    model, update, x = decoder()
    forward = lambda m, x: m(x)  # noqa: E731
    mask = None
    if why == "looks at numbers":
        forward = lambda m, x: m(x) * (1.0 if x.sum().item() else 2.0)  # noqa: E731
    elif why == "asks for the graph":
        forward = lambda m, x: m(x) if m(x).grad_fn is not None else m(x).detach()  # noqa: E731
    elif why == "random numbers":
        forward = lambda m, x: m(x) + 0 * torch.rand(())  # noqa: E731
    elif why == "one slice is padding":
        mask = torch.arange(7)[:, None].expand(7, 5) != 3
    else:
        monkeypatch.delattr(linear_products._functorch, "_add_batch_dim")
        assert not hasattr(linear_products._functorch, "_add_batch_dim")
    options = {"probes": 14, "slices": 7, "mask": mask}
    found = function_space_rates(model, update, x, forward, **options)
    alone = function_space_rates(model, update, x, forward, memory=0, **options)
    for name in alone:
        assert found[name].value == pytest.approx(alone[name].value, rel=1e-10), name


def test_a_forward_that_asks_whether_something_is_trained_is_told_so_side_by_side(monkeypatch):
    """`vmap` itself says no of everything; bitsandbytes' 4-bit layers take a path without derivatives then."""
    model, update, x = decoder()
    ran = []
    plain = Runner.side_by_side
    monkeypatch.setattr(Runner, "side_by_side", lambda *a: ran.append(plain(*a)) or ran[-1])
    forward = lambda m, x: y if (y := m(x)).requires_grad and not x.requires_grad else y.detach()  # noqa: E731
    found = function_space_rates(model, update, x, forward, probes=14, slices=7)
    assert ran
    alone = function_space_rates(model, update, x, forward, probes=14, slices=7, memory=0)
    assert alone["words.weight"].value > 0
    for name in alone:
        assert found[name].value == pytest.approx(alone[name].value, rel=1e-10), name


class WithLoss(nn.Module):
    """Of every token by itself; the loss is nanoGPT's, which asks for views of the targets."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x, targets):
        logits = self.net(x)
        return logits, nn.functional.cross_entropy(logits.view(-1, 5), targets.view(-1))


@pytest.mark.parametrize("memory", [0, 1 << 26])
def test_slices_are_whole_tensors_to_a_forward_that_asks_for_views(memory):
    """Every fourth example of a batch has no view in other shapes: the batch was left whole, or slices refused."""
    torch.manual_seed(0)
    model, x = WithLoss(), torch.randn(8, 3, 4)
    targets = torch.randint(5, (8, 3))
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    found = function_space_rates(model, update, (x, targets), probes=8, slices=4, memory=memory)
    plain = function_space_rates(model.net, {n.removeprefix("net."): u for n, u in update.items()}, x, probes=8, slices=4)
    for name, rate in plain.items():
        assert found[f"net.{name}"].value == pytest.approx(rate.value, rel=1e-5)  # float32, in other batches
