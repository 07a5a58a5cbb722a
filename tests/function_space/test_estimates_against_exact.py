"""The estimators against exact derivatives: unbiased where they claim to be, with honest standard errors."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerwise.errors import LayerwiseError
from layerwise.function_space import Rates, function_space_rates
from layerwise.function_space.measuring.exact import CHANGES, derivatives
from layerwise.function_space.measuring.moments import (
    ESTIMATORS,
    Moments,
    TensorUpdate,
    combine,
    full_cov,
    iid,
    kronecker,
)


class AllRanks(nn.Module):
    """One parameter of every rank from 0 to 5, each entering nonlinearly."""

    def __init__(self) -> None:
        super().__init__()
        for rank in range(6):
            shape = (3, 2, 2, 3, 2)[:rank]
            self.register_parameter(f"rank{rank}", nn.Parameter(torch.randn(shape, dtype=torch.float64)))

    def forward(self, x):
        parts = [torch.tanh(x[:, : p.numel()] * p.flatten()).sum(1, keepdim=True) for p in self.parameters()]
        return torch.cat(parts, 1).cumsum(1) * x[:, :6]


def all_ranks():
    torch.manual_seed(0)
    model = AllRanks()
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    return model, update, torch.randn(20, 72, dtype=torch.float64)


def test_exact_is_the_limit_of_a_difference_quotient():
    """Independent of autograd: central differences in float64 have an error of h^2, here 1e-10."""
    model, update, x = all_ranks()
    rates = function_space_rates(model, update, x, method="exact")
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.add_(update[name], alpha=1e-5)
            above = model(x)
            p.add_(update[name], alpha=-2e-5)
            below = model(x)
            p.add_(update[name], alpha=1e-5)
        quotient = ((above - below) / 2e-5).square().mean().sqrt().item()
        assert rates[name].value == pytest.approx(quotient, rel=1e-8)
        assert rates[name].stderr == 0
        assert rates.interval(name) == (rates[name].value, rates[name].value)


def test_full_cov_is_within_its_error_on_ranks_0_to_5():
    model, update, x = all_ranks()
    exact = function_space_rates(model, update, x, method="exact")
    found = function_space_rates(model, update, x, method="full_cov", probes=2000, slices=1)
    for name in exact:
        # Six intervals of 4 standard errors: all hold with probability 0.9996.
        assert abs(found[name].value - exact[name].value) < 4 * found[name].stderr
        assert 0 < found[name].stderr < 0.03 * found[name].value


@pytest.mark.parametrize("slices", [1, 8])
def test_intervals_hold_the_truth_95_times_in_100(slices):
    """200 seeds x 6 tensors, on the whole batch and on slices of three examples.

    A coverage of 0.937 (what 600 seeds find) has a standard deviation of 0.017 over 200.
    """
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    x = torch.randn(24, 8)
    exact = function_space_rates(model, update, x, method="exact")
    inside = dict.fromkeys(exact, 0)
    pulls = {name: [] for name in exact}
    for seed in range(200):
        found = function_space_rates(model, update, x, method="full_cov", probes=32, seed=seed, slices=slices)
        for name in exact:
            low, high = found.interval(name)
            inside[name] += low <= exact[name].value <= high
            pulls[name].append((found[name].value, found[name].stderr))
    for name, count in inside.items():
        assert 0.88 <= count / 200 <= 0.99, (name, count)
        values, errors = torch.tensor(pulls[name]).T
        # The mean stated error is the actual spread; 200 seeds know a standard deviation to 5 %.
        assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.2)
        # Unbiased: the square root of a mean over 32 probes is low by 1 / (4 * 32) at most.
        assert values.mean().item() == pytest.approx(exact[name].value, rel=0.008 + 3 * 0.13 / math.sqrt(200))
    assert 0.925 <= sum(inside.values()) / (200 * len(inside)) <= 0.97


@pytest.mark.slow  # half a minute
def test_kroneckers_error_is_that_of_its_own_mean():
    """Kronecker is biased, so its intervals are checked against its own value at very many probes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    x = torch.randn(24, 8)
    limit = function_space_rates(model, update, x, method="kronecker", probes=20000)["0.weight"].value
    rates = [function_space_rates(model, update, x, method="kronecker", probes=32, seed=seed) for seed in range(200)]
    inside = [low <= limit <= high for low, high in (r.interval("0.weight") for r in rates)]
    assert 0.90 <= sum(inside) / 200 <= 0.99
    assert all(r["0.weight"].estimator == "kronecker" and r["0.bias"].estimator == "full_cov" for r in rates)


@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.integers(0, 1000),
    st.integers(1, 40),
)
@settings(max_examples=40)
def test_moments_are_their_definitions(probes, shape, seed, piece):
    """Against the formulas written with plain sums, whatever the pieces a tensor is taken in."""
    import layerwise.function_space.measuring.moments as module

    torch.manual_seed(seed)
    delta, grads = torch.randn(shape).double(), torch.randn(probes, *shape).double()
    kept = module._CPU_PIECE
    module._CPU_PIECE = piece
    try:
        logs = {}
        for estimator in (kronecker(tuple(shape)), iid(tuple(shape)), full_cov(tuple(shape))):
            moments = Moments(estimator, TensorUpdate(delta))
            for some in grads.split([1, probes - 1] if probes > 1 else [1]):
                moments.add(some)
            logs[estimator.name] = moments.logs(probes).exp()
        kron, square, total = logs["kronecker"], logs["iid"], logs["full_cov"]
    finally:
        module._CPU_PIECE = kept
    z = delta * grads
    dims = tuple(range(1, z.ndim))
    assert torch.allclose(square[:, 0], z.square().sum(dims))
    assert torch.allclose(total[:, 0], z.sum(dims).square())
    assert torch.allclose(kron[:, 0], z.square().sum(dims))
    for d in dims:
        assert torch.allclose(kron[:, d], z.sum(d).square().flatten(1).sum(1))


@pytest.mark.parametrize("method", [*CHANGES, *ESTIMATORS])
def test_any_scale_of_update_and_gradient_is_measured(method):
    """1e-30 times 1e-12, squared, is 1e-84: float32 ends at 1e-45. Rates are exactly homogeneous in powers of two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    x = torch.randn(7, 5)
    plain = function_space_rates(model, update, x, method=method, probes=4)
    tiny = {name: u * 2.0**-100 for name, u in update.items()}
    small = function_space_rates(model, tiny, x, lambda m, x: m(x) * 2.0**-40, method, 4)
    for name in plain:
        assert small[name].value == pytest.approx(plain[name].value * 2.0**-140, rel=1e-6)
    naive = (tiny["0.weight"] * (torch.randn(6, 5) * 2.0**-40)).square().sum()
    assert naive == 0  # what squaring in float32 gives


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_the_rates_of_full_ones(dtype):
    """Weights and update exact in both dtypes; what differs is the rounding of activations and gradients."""
    torch.manual_seed(0)
    full = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    half = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).to(dtype)
    half.load_state_dict(full.state_dict())
    full.load_state_dict(half.state_dict())
    update = {name: (torch.randn_like(p) * 1e-6).to(dtype) for name, p in half.named_parameters()}
    x = torch.randn(64, 16).to(dtype)
    for method in ("kronecker", "full_cov", "iid", "exact"):
        low = function_space_rates(half, update, x, method=method, probes=8)
        high = function_space_rates(full, {n: u.float() for n, u in update.items()}, x.float(), method=method, probes=8)
        for name in high:
            # A rounding is 2^-8 (bfloat16) or 2^-11; a rate passes a handful of them, mostly averaged out.
            assert low[name].value == pytest.approx(high[name].value, rel=0.03 if dtype == torch.bfloat16 else 0.004)


def test_probes_taken_together_or_one_by_one_give_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(6, 3, 9)
    model(x)
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    one = function_space_rates(model, update, x, probes=7, memory=0)
    many = function_space_rates(model, update, x, probes=7, memory=1 << 30)
    for name in one:
        assert one[name].value == pytest.approx(many[name].value, rel=1e-5)
        assert one[name].stderr == pytest.approx(many[name].stderr, rel=1e-3)


class NoBatching(torch.autograd.Function):
    """An operation with a backward that vmap cannot batch, and no forward-mode formula."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if grad.abs().max().item() < 0:  # .item() cannot be batched
            raise AssertionError
        return 2 * x * grad


def test_operations_without_batching_or_forward_mode_fall_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    x = torch.randn(6, 4)

    def special(model, x):
        return model[1](NoBatching.apply(model[0](x)))

    def plain(model, x):
        return model[1](model[0](x).square())

    for method in ("kronecker", "exact"):
        theirs = function_space_rates(model, update, x, special, method, probes=5)
        ours = function_space_rates(model, update, x, plain, method, probes=5)
        for name in ours:
            assert theirs[name].value == pytest.approx(ours[name].value, rel=1e-5)


def test_derivative_without_formulas_of_attention():
    torch.manual_seed(0)
    x, w, dw = torch.randn(2, 1, 5, 4), torch.randn(4, 4), torch.randn(4, 4)

    def attend(weight):
        y = x @ weight
        return nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)

    found, _ = next(derivatives(lambda tensors: attend(tensors["w"]), {"w": w}, {"w": dw}))
    h = 1e-3
    quotient = (attend(w + h * dw) - attend(w - h * dw)) / (2 * h)
    assert torch.allclose(found, quotient, atol=1e-3)


def test_masked_entries_count_neither_in_the_probes_nor_in_the_mean():
    """Padding a batch must change nothing, however wild the outputs on padding are (reference section 5)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4)).double()
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    tokens = torch.randint(1, 11, (3, 5))
    padded = torch.cat([tokens, torch.zeros(3, 4, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    with torch.no_grad():
        model[0].weight[0] = 1e3
    for method in ("exact", "full_cov"):
        clean = function_space_rates(model, update, tokens, method=method, probes=4000)
        masked = function_space_rates(model, update, padded, method=method, probes=4000, mask=mask, slices=1)
        # That forward knows whole batches only, so it is measured without slices.
        by_forward = function_space_rates(model, update, padded, lambda m, x: (m(x), mask), method, 4000)
        naive = function_space_rates(model, update, padded, method=method, probes=4000)
        assert masked.entries == clean.entries == 60
        assert by_forward["1.weight"].value == masked["1.weight"].value
        for name in clean:
            error = 5 * math.hypot(clean[name].stderr, masked[name].stderr) + 1e-12
            assert masked[name].value == pytest.approx(clean[name].value, abs=error)
        assert naive["1.weight"].value > 100 * clean["1.weight"].value


def test_several_batches_are_averaged_as_mean_squares():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    batches = [torch.randn(6, 4).double() for _ in range(3)]
    both = function_space_rates(model, update, batches, method="exact")
    single = [function_space_rates(model, update, batch, method="exact") for batch in batches]
    for name in both:
        expected = math.sqrt(sum(s[name].value ** 2 for s in single) / 3)
        assert both[name].value == pytest.approx(expected, rel=1e-12)
    probed = function_space_rates(model, update, batches, method="full_cov", probes=31)
    assert probed.probes == 31
    assert probed.entries == 3 * 18


def test_outputs_of_transformers_models_and_mappings_are_found():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=31, n_positions=12)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(1, 31, (2, 8))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    inputs["attention_mask"][1, 5:] = 0
    update = {name: torch.randn_like(p) * 1e-3 for name, p in model.named_parameters()}
    rates = function_space_rates(model, update, inputs, probes=4)
    assert rates.entries == 13 * 31  # the padding is left out without being asked to
    assert "lm_head.weight" not in rates  # tied to the embedding: one tensor, one rate
    exact = function_space_rates(model, update, inputs, "log_softmax", "exact")
    assert exact.space == "log_softmax"
    assert exact["transformer.h.0.attn.c_attn.weight"].value > 0


def test_rates_are_data_one_can_keep(tmp_path):
    model, update, x = all_ranks()
    rates = function_space_rates(model, update, x, probes=8)
    rates.save(tmp_path / "rates.json")
    assert Rates.load(tmp_path / "rates.json") == rates
    with pytest.raises(LayerwiseError, match=r"file of rates .*none/rates.json' cannot be written \(No such file"):
        rates.save(tmp_path / "none" / "rates.json")
    with pytest.raises(LayerwiseError, match="cannot be read"):
        Rates.load(tmp_path / "none.json")
    assert sum(rate.share for rate in rates.values()) == pytest.approx(1)
    assert "rank3" in str(rates)
    assert rates.table(top=2).count("rank") == 2
    with pytest.raises(LayerwiseError, match="not function-space rates"):
        Rates.from_dict({"rates": {"a": 1}})
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = replace(rates, rates={f"transformer.h.0.attn.{name}": rate for name, rate in rates.items()}).plot()
    assert len(axes.patches) == 6
    axes.figure.canvas.draw()
    assert min(label.get_window_extent().x0 for label in axes.get_yticklabels()) >= 0  # no name is cut off
    one = function_space_rates(model, update, x, probes=1)
    assert math.isnan(one["rank2"].stderr)
    assert one.to_dict()["rates"]["rank2"]["stderr"] is None


def test_a_mean_over_probes_can_lose_all_but_one():
    [(value, stderr)] = combine((1,), torch.tensor([[[-math.inf], [0.0], [-math.inf]]]))
    assert value == pytest.approx(math.sqrt(1 / 3))
    assert math.isfinite(stderr)
    assert combine((-1, 1, 1), torch.full((1, 4, 3), -math.inf)) == [(0.0, 0.0)]


def test_bad_input_is_one_clear_line():
    model, update, x = all_ranks()
    for bad, text in [
        ({"update": {"rank9": torch.ones(1)}}, "did you mean"),
        ({"update": {"rank2": torch.ones(1)}}, "has shape"),
        ({"method": "fast"}, "'fast'"),
        ({"probes": 0}, "probes=0): give a whole number from 1 on"),
        ({"probe": 8}, "did you mean 'probes'"),
        ({"forward": "probs"}, "'probs'"),
        ({"batch_norm": "off"}, "'off'"),
        ({"inputs": []}, "at least one batch"),
        ({"mask": torch.ones(3)}, "mask has shape"),
        ({"mask": torch.zeros(20)}, "no output entry"),
        ({"forward": lambda m, x: m(x).detach()}, "do not depend"),
        ({"forward": lambda m, x: m(x).argmax(1)}, "torch.int64"),
        ({"forward": lambda m, x: "text"}, "returned str"),
        ({"forward": lambda m, x: m(x)[:0]}, "empty"),
    ]:
        with pytest.raises(LayerwiseError) as error:
            function_space_rates(**{"model": model, "update": update, "inputs": x, "probes": 2, **bad})
        assert text in str(error.value)
        assert "\n" not in str(error.value)
