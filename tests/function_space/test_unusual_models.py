"""Models that forward-mode or a plain forward alone would measure wrongly, refuse or change."""

import functools
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import layerwise as lw
from layerwise.errors import LayerwiseError
from layerwise.function_space import BaseRates, FLeRM, FunctionSpaceRecorder, function_space_rates
from layerwise.function_space.measuring.measurement import Measurement


def quotient(model, name, direction, x, h=1e-6):
    """RMS of a central difference quotient, in float64, with torch's native fast path off."""
    p = model.get_parameter(name)
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            old = p.clone()
            above = (p.copy_(old + h * direction), model(x))[1]
            below = (p.copy_(old - h * direction), model(x))[1]
            p.copy_(old)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return ((above - below) / (2 * h)).square().mean().sqrt().item()


class Remembering(nn.Module):
    """Its outputs grow with the number of calls, which a list of its own remembers."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 3, bias=False), []

    def forward(self, x):
        self.calls.append(self.linear(x))
        return len(self.calls) * self.calls[-1]


@pytest.mark.parametrize("method", ["full_cov", "exact", "difference"])
def test_every_forward_of_a_measurement_starts_from_the_state_that_training_left(method):
    torch.manual_seed(0)
    model, x, update = Remembering().double(), torch.randn(8, 4).double(), torch.randn(3, 4).double()
    model(x)
    rate = function_space_rates(model, {"linear.weight": update}, x, method=method, probes=512)["linear.weight"]
    truth = 2 * (x @ update.T).square().mean().sqrt().item()  # the second call
    assert rate.value == pytest.approx(truth, rel=1e-12, abs=4 * rate.stderr)
    assert len(model.calls) == 1


class Checkpointing(nn.Module):
    def __init__(self, checkpoints):
        super().__init__()
        self.first, self.second, self.checkpoints = nn.Linear(4, 8), nn.Linear(8, 3), checkpoints

    def forward(self, x):
        run = functools.partial(checkpoint, use_reentrant=False) if self.checkpoints else (lambda f, h: f(h))
        return self.second(run(lambda h: self.first(h).relu(), x))


def test_a_forward_that_checkpoints_is_measured_as_without():
    torch.manual_seed(0)
    plain, other, x = Checkpointing(False), Checkpointing(True), torch.randn(16, 4)
    other.load_state_dict(plain.state_dict())
    update = {name: torch.randn_like(p) for name, p in plain.named_parameters()}
    expected = function_space_rates(plain, update, x, probes=16)
    found = function_space_rates(other, update, x, probes=16)
    for name in update:  # the same probes: rounding alone differs
        assert found[name].value == pytest.approx(expected[name].value, rel=1e-4)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_of_sparse_gradients_are_measured_and_watched_as_dense_ones(kind):
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(kind(11, 6, sparse=sparse), nn.Linear(6, 3)), torch.randint(0, 11, (8, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch = lw.watch(model, optimizer, every=1)
        recorder = FunctionSpaceRecorder(model, optimizer)
        model(x).square().mean().backward()
        with recorder.step(x):
            optimizer.step()
        assert model[0].sparse is sparse
        assert model[0].weight.grad.is_sparse is sparse
        found.append((recorder.records[0].rates["0.weight"].value, watch.records[0].modules["0"].update.gradient_rms))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    ("model", "said"),
    [(nn.Linear(4, 3, device="meta"), "is on the meta device"), (nn.Linear(4, 3, dtype=torch.cfloat), "is complex")],
)
def test_parameters_of_which_nothing_can_be_measured_are_named(model, said):
    x = torch.zeros(2, 4, dtype=model.weight.dtype, device=model.weight.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(LayerwiseError, match=f"'weight' {said}"):
        function_space_rates(model, {"weight": torch.zeros_like(model.weight)}, x)
    with pytest.raises(LayerwiseError, match=f"'weight' {said}"), FunctionSpaceRecorder(model, optimizer).step(x):
        pass


class UnderTwoNames(nn.Module):
    """A matrix, a module and a buffer that each have two names; the forward writes the buffer by one and reads the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = self.again = nn.LayerNorm(4)
        self.register_buffer("written", torch.ones(4))
        self.register_buffer("read", self.written)

    def forward(self, x):
        self.written.fill_(2.0)
        return self.again(self.second(self.norm(self.first(x)).tanh())) * self.read


@pytest.mark.parametrize("slices", [1, 2])
def test_what_has_two_names_is_one(slices):
    torch.manual_seed(0)
    model, x = UnderTwoNames().double(), torch.randn(6, 4).double()
    model.read = model.written  # which `double` parted
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    exact = function_space_rates(model, update, x, method="exact")
    rates = function_space_rates(model, update, x, probes=400, slices=slices)
    assert model.read.tolist() == [1.0] * 4
    assert list(rates) == ["first.weight", "first.bias", "second.bias", "norm.weight", "norm.bias"]
    for name, direction in update.items():
        assert exact[name].value == pytest.approx(quotient(model, name, direction, x), rel=1e-7)
        assert rates[name].value == pytest.approx(exact[name].value, abs=4 * rates[name].stderr)


def test_an_empty_update_is_told():
    with pytest.raises(LayerwiseError, match="update is empty"):
        function_space_rates(nn.Linear(4, 3), {}, torch.zeros(2, 4))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3])
def test_embedding_bags_under_exact(mode, padding):
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(11, 6, mode=mode, padding_idx=padding), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randint(0, 11, (5, 7))
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    rates = function_space_rates(model, update, x, method="exact")
    for name, direction in update.items():
        # Central differences: h^2 and rounding over h, both some 1e-10.
        assert rates[name].value == pytest.approx(quotient(model, name, direction, x), rel=1e-7)


class Ragged(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 6, mode="sum")
        self.register_buffer("words", torch.randint(0, 11, (9,)))

    def forward(self, weights):
        return self.bag(self.words, torch.tensor([0, 4, 4]), weights)


def test_bags_by_offsets_with_weights_and_an_empty_one():
    torch.manual_seed(0)
    model, weights = Ragged().double(), torch.rand(9).double()
    update = {"bag.weight": torch.randn(11, 6).double()}
    rates = function_space_rates(model, update, weights, method="exact")
    assert rates["bag.weight"].value == pytest.approx(quotient(model, "bag.weight", update["bag.weight"], weights), rel=1e-7)


@pytest.mark.parametrize("method", ["exact", "difference", "full_cov"])
def test_the_update_of_a_padding_row_counts(method):
    """Its gradient is 0 in training, and its update need not be: weight decay moves it, and the outputs with it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 2)).double()
    update = {"0.weight": torch.zeros(5, 4).double()}
    update["0.weight"][0] = torch.randn(4)
    x = torch.tensor([[0, 1, 2], [0, 0, 3]])
    found = function_space_rates(model, update, x, method=method, probes=400)["0.weight"]
    assert found.value == pytest.approx(quotient(model, "0.weight", update["0.weight"], x), rel=1e-7, abs=4 * found.stderr)
    assert model[0].padding_idx == 0


class Squared(torch.autograd.Function):
    """Without a forward-mode formula."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_a_rate_says_which_formula_exact_used():
    model = nn.Linear(3, 2)
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    x = torch.randn(4, 3)
    assert function_space_rates(model, update, x, method="exact")["weight"].estimator == "exact"
    squared = function_space_rates(model, update, x, lambda m, x: Squared.apply(m(x)), "exact")
    assert squared["weight"].estimator == "exact, reverse"


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", ["kronecker", "exact", "difference"])
def test_embeddings_that_renormalise_their_weights_are_measured_on_copies(bag, frozen, method):
    torch.manual_seed(0)
    kind = nn.EmbeddingBag if bag else nn.Embedding
    model = nn.Sequential(kind(11, 6, max_norm=1.0), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight.mul_(3)
    model[0].weight.requires_grad_(not frozen)
    before = model[0].weight.detach().clone()
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    rates = function_space_rates(model, update, torch.randint(0, 11, (5, 7)), method=method)
    assert torch.equal(model[0].weight, before)
    assert rates["1.bias"].value > 0


def test_whole_updates_of_such_embeddings_begin_at_the_weights_as_they_are():
    torch.manual_seed(0)
    model = nn.Embedding(11, 6, max_norm=1.0).double()
    old, update, x = model.weight.detach().clone().mul_(3), torch.randn(11, 6).double(), torch.arange(11)
    model.weight.data.copy_(old)
    rates = function_space_rates(model, {"weight": update}, x, method="difference", linear=None)
    before, after = (nn.functional.normalize(w) * w.norm(dim=1, keepdim=True).clamp(max=1) for w in (old, old + update))
    # The embedding divides by the norm plus 1e-7.
    assert rates["weight"].value == pytest.approx((after - before).square().mean().sqrt().item(), rel=1e-6)


@torch.no_grad()
def normalises(m):
    m.mix.weight.copy_(nn.functional.normalize(m.mix.weight, dim=1))


def writes_a_row(m):
    m.mix.weight.detach()[0].mul_(0.5)


def clips_behind_autograd(m):
    m.mix.weight.data.clamp_(0.0, 0.1)


def puts_other_data(m):
    m.mix.weight.data = m.mix.weight.data * 2


def writes_a_frozen_weight(m):
    m.frozen.data.mul_(0.5)


WRITERS = (normalises, writes_a_row, clips_behind_autograd, puts_other_data, writes_a_frozen_weight)


def draws_random_numbers(m):
    random.random(), np.random.rand(), torch.rand(1, generator=m.generator)


def keeps_what_it_saw(m):
    m.calls, m.cached = m.calls + 1, m.mix(m.kept) * m.mix.weight.sum()
    m.log.append(m.cached)
    m.counts["calls"] = m.calls
    m.mix.register_forward_hook(lambda *_: None)


class Changing(nn.Module):
    """Does something to itself in its forward pass."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.odd = nn.Linear(4, 3), nn.utils.spectral_norm(nn.Linear(3, 3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("kept", torch.ones(4))
        self.change, self.calls, self.log, self.counts, self.generator = change, 0, [], {}, torch.Generator()
        self.mix.weight.grad = torch.ones(3, 4)

    def forward(self, x):
        self.change(self)
        self.kept.add_(1)
        return self.odd(self.mix(x) * self.frozen)


def all_of(m):
    weights = {n: (p.tolist(), p.data_ptr(), p._version, p.requires_grad) for n, p in m.named_parameters()}
    states = random.getstate(), np.random.get_state()[1].tolist(), m.generator.get_state().tolist()
    buffers = {name: (buffer.tolist(), buffer._version) for name, buffer in m.named_buffers()}
    own = (
        m.calls,
        hasattr(m, "cached"),
        len(m.log),
        dict(m.counts),
        len(m.mix._forward_hooks),
        id(m.odd.weight),
    )
    return weights, buffers, m.mix.weight.grad.tolist(), states, own, torch.get_rng_state().tolist()


@pytest.mark.parametrize("method", ["full_cov", "exact", "difference"])
@pytest.mark.parametrize("change", [*WRITERS, draws_random_numbers, keeps_what_it_saw])
def test_forwards_that_write_weights_are_refused_and_all_else_is_put_back(change, method):
    model = Changing(change)
    update = {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(6, 4)
    before = all_of(model)
    refused = pytest.raises(LayerwiseError, match=r"writes parameter '(mix\.weight|frozen)'")
    with refused if change in WRITERS else nullcontext():
        assert function_space_rates(model, update, x, method=method)["mix.weight"].value > 0
    assert all_of(model) == before


class AdaptedInside(nn.Module):
    """Adds an adapter to a frozen weight by a parametrization made in the forward, as peft does for `target_parameters`."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).requires_grad_(False)
        self.low, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x):
        added = self.up.weight @ self.low.weight
        parametrize.register_parametrization(self.layer, "weight", Added(added))
        y = self.layer(x)
        parametrize.remove_parametrizations(self.layer, "weight", leave_parametrized=False)
        return y


class Added(nn.Module):
    def __init__(self, added):
        super().__init__()
        self.added = added

    def forward(self, weight):
        return weight + self.added


def test_a_parametrization_made_in_the_forward_writes_nothing():
    model, x = AdaptedInside(), torch.randn(6, 4)
    update = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    frozen = model.layer.weight
    found = function_space_rates(model, update, x, method="full_cov", probes=2048)
    by_hand = {
        "low.weight": x @ update["low.weight"].T @ model.up.weight.T,
        "up.weight": model.low(x) @ update["up.weight"].T,
    }
    for name, change in by_hand.items():
        rate = found[name]
        assert abs(rate.value - change.square().mean().sqrt().item()) < 5 * rate.stderr
    assert model.layer.weight is frozen


class Marked(nn.Module):
    """Reads attributes of its parameters, as mup's readout does `infshape` and quantised layers their state."""

    def __init__(self):
        super().__init__()
        self.free, self.frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
        self.free.infshape, self.frozen.quant_state = 2.0, 3.0

    def forward(self, x):
        return x * self.free * self.free.infshape + self.frozen * self.frozen.quant_state


@pytest.mark.parametrize("method", ["full_cov", "exact", "difference"])
def test_parameters_keep_the_attributes_that_users_gave_them(method):
    x = torch.eye(3)
    rates = function_space_rates(Marked(), {"free": torch.ones(3)}, x, method=method, probes=200)
    # 2 on the diagonal, 0 off it.
    assert rates["free"].value == pytest.approx(2 / 3**0.5, rel=1e-6, abs=4 * rates["free"].stderr)
    model = Marked()
    recorder = FunctionSpaceRecorder(model, torch.optim.SGD([model.free], lr=0.1), every=1)
    model(x).sum().backward()
    with recorder.step(x):
        recorder.optimizer.step()
    assert recorder.records[0].rates["free"].value > 0


@pytest.mark.parametrize("masked", [False, True])
def test_torchs_own_encoder_is_measured_off_its_fast_path(masked):
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.embedding, self.encoder = nn.Embedding(7, 8), nn.TransformerEncoder(layer, 1)

        def forward(self, x):
            padding = x == 0 if masked else None
            return self.encoder(self.embedding(x), src_key_padding_mask=padding)[:, 0]

    model, x = Encoder().double(), torch.randint(1, 7, (4, 5))
    x[:2, 3:] = 0
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for method in ("exact", "difference"):
        small = {name: u * (1e-7 if method == "difference" else 1) for name, u in update.items()}
        rates = function_space_rates(model, small, x, method=method)
        assert torch.backends.mha.get_fastpath_enabled()
        for name in ("encoder.layers.0.linear1.weight", "encoder.layers.0.self_attn.in_proj_weight"):
            scale = 1e-7 if method == "difference" else 1
            assert rates[name].value / scale == pytest.approx(quotient(model, name, update[name], x), rel=1e-4)


def logits(model, x):
    return model(x)


def test_output_spaces_are_told_apart_by_code_and_by_name():
    spaces = [
        Measurement(forward).space
        for forward in (
            None,
            "log_softmax",
            logits,
            lambda m, x: m(x),
            lambda m, x: m(x).log_softmax(-1),
            lambda m, x: m(x)[0],
            lambda m, x: m(x)[1],
            functools.partial(lambda m, x, i: m(x)[i], i=0),
            functools.partial(lambda m, x, i: m(x)[i], i=1),
        )
    ]
    assert len(set(spaces)) == len(spaces)
    assert Measurement(lambda m, x: m(x)).space == Measurement(lambda m, x: m(x)).space
    assert Measurement(logits).space == "logits"
    assert Measurement(lambda m, x: m(x), space="mine").space == "mine"


def test_a_base_of_another_lambda_is_refused():
    def small(forward, **options):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        recorder = FunctionSpaceRecorder(model, torch.optim.SGD(model.parameters(), 0.1), forward=forward, **options)
        x = torch.randn(4, 3)
        model(x).square().mean().backward()
        with recorder.step(x):
            recorder.optimizer.step()
        return BaseRates.of(recorder)

    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    base = small(lambda m, x: m(x).log_softmax(-1))
    with pytest.raises(LayerwiseError, match="space is 'lambda-"):
        FLeRM(model, optimizer, base, forward=lambda m, x: m(x))
    FLeRM(model, optimizer, small(lambda m, x: m(x), space="mine"), forward=logits, space="mine").detach()


def test_blocks_that_are_wrapped_are_matched_by_the_plain_ones_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def network(width):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2)]
        return nn.Sequential(nn.Linear(3, width), nn.Sequential(*blocks), nn.Linear(width, 2))

    def train(model, watcher, optimizer):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        model(x).square().mean().backward()
        with watcher.step(x):
            optimizer.step()
        return watcher

    def base():
        model = network(4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return BaseRates.of(train(model, FunctionSpaceRecorder(model, optimizer), optimizer))

    found = []
    for wrap in (
        lambda block: block,
        checkpoint_wrapper,
        lambda block: torch.compile(block, backend="eager"),
    ):
        model = network(8)
        for index in range(2):
            model[1][index] = wrap(model[1][index])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        rates = train(model, FLeRM(model, optimizer, base(), {"1.*": "copy"}), optimizer).learning_rates()
        found.append(list(rates.values()))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


class Opaque(torch.autograd.Function):
    """A product with a frozen weight whose backward torch cannot differentiate again."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


class Twice(Opaque):
    """The same, differentiable again."""

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


class Silent(Opaque):
    """The same, whose backward drops its graph without the error of `once_differentiable`."""

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            return grad @ ctx.saved_tensors[0], None


class Quantised(nn.Module):
    """A residual block whose frozen product is `function`; as bitsandbytes', one without formulas where nothing trains."""

    def __init__(self, function, inference_path):
        super().__init__()
        self.first, self.function, self.inference_path = nn.Linear(4, 4), function, inference_path
        self.register_buffer("frozen", torch.randn(4, 4))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.inference_path and not (torch.is_grad_enabled() and h.requires_grad):
            return h + h.detach() @ self.frozen.T
        return h + self.function.apply(h, self.frozen)


@pytest.mark.parametrize("inference_path", [False, True])
def test_exact_is_right_through_custom_functions_without_a_forward_formula(inference_path):
    torch.manual_seed(0)
    model, x = Quantised(Twice, inference_path).double(), torch.randn(6, 4).double()
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    rates = function_space_rates(model, update, x, method="exact")
    for name, direction in update.items():
        assert rates[name].value == pytest.approx(quotient(model, name, direction, x), rel=1e-7)
        assert rates[name].estimator == "exact, reverse"


@pytest.mark.parametrize("function", [Opaque, Silent])
@pytest.mark.parametrize("inference_path", [False, True])
def test_exact_refuses_custom_functions_that_have_a_first_derivative_alone(function, inference_path):
    torch.manual_seed(0)
    model, x = Quantised(function, inference_path), torch.randn(6, 4)
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with pytest.raises(LayerwiseError, match=r"'first.weight' cannot be found.*method='full_cov'"):
        function_space_rates(model, update, x, method="exact")
    found = function_space_rates(model, update, x, method="full_cov", probes=400)["first.weight"]
    true = quotient(model.double(), "first.weight", update["first.weight"].double(), x.double())
    assert found.value == pytest.approx(true, abs=4 * found.stderr)


def test_exact_follows_custom_functions_that_have_a_forward_formula():
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

        @staticmethod
        def jvp(ctx, tangent):
            return 2 * ctx.saved_tensors[0] * tangent

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double(), torch.randn(6, 4).double()
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    rates = function_space_rates(model, update, x, lambda m, x: m[1](Forward.apply(m[0](x))), "exact")
    for name, direction in update.items():
        squared = nn.Sequential(model[0], Square(), model[1])
        where = name.replace("1.", "2.")
        assert rates[name].value == pytest.approx(quotient(squared, where, direction, x), rel=1e-7)
        assert rates[name].estimator == "exact"


class Square(nn.Module):
    def forward(self, x):
        return x * x


def test_exact_is_right_on_a_4_bit_base():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    base.weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64) / 8, requires_grad=False, quant_type="nf4")
    base.to("cpu")
    if not base.weight.bnb_quantized:
        base.weight._quantize("cpu")
    base.support_avx512bf16_for_cpu = False  # the path that GPUs take
    model, x = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), base), torch.randn(16, 8)
    update = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    rates = function_space_rates(model, update, x, method="exact")
    for name, direction in update.items():
        # Central differences in float32: rounding over h, some 1e-4.
        assert rates[name].value == pytest.approx(quotient(model, name, direction, x, h=1e-3), rel=1e-2)


class Masked(nn.Linear):
    def forward(self, x, mask=None, *, scale=1.0):
        return super().forward(x) * scale if mask is None else super().forward(x) * mask


def test_of_a_tuple_the_model_gets_as_many_as_it_takes():
    """What a DataLoader yields, of which `forward` takes the first or the first two."""
    model, x, y, mask = nn.Linear(3, 2), torch.randn(4, 3), torch.zeros(4), torch.ones(4, 2)
    update = {"weight": torch.ones(2, 3)}
    assert function_space_rates(model, update, (x, y)) == function_space_rates(model, update, x)
    model = Masked(3, 2)
    assert function_space_rates(model, update, (x, 2 * mask, y)) == function_space_rates(model, update, (x, 2 * mask))
    with pytest.raises(RuntimeError) as raised:
        function_space_rates(model, update, [x, y])
    assert "a list, which is several batches" in raised.value.__notes__[0]


class SeveralResults(nn.Linear):
    """Returns what `make` makes of its outputs, as nanoGPT does of logits and a loss."""

    def __init__(self, make):
        super().__init__(3, 2)
        self.make = make

    def forward(self, x, targets=None):
        return self.make(super().forward(x).tanh())


@pytest.mark.parametrize(
    "make",
    [
        lambda y: (y, y.square().mean()),
        lambda y: (y, None),
        lambda y: [y, None, y.sum(), 0.5],
        lambda y: {"loss": y.sum(), "logits": y},
    ],
)
@pytest.mark.parametrize("method", ["full_cov", "exact", "difference"])
def test_the_one_output_among_a_loss_and_nothing_is_taken(make, method):
    torch.manual_seed(0)
    model, x = SeveralResults(make), torch.randn(8, 3)
    update = {name: 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    found = function_space_rates(model, update, (x, x[:, 0]), method=method, probes=8)
    model.make = lambda y: y
    assert found == function_space_rates(model, update, x, method=method, probes=8)


def test_recorders_matching_and_watches_take_the_output_of_a_tuple():
    """The same losses and records as of the model without its tuple, in a loop that has the loss from the model."""

    def run(make):
        torch.manual_seed(0)
        model = SeveralResults(make)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        flerm = FLeRM(model, optimizer, probes=4)
        watch = lw.watch(model, optimizer, every=1, function_space_every=1)
        recorder = FunctionSpaceRecorder(model, optimizer, every=1, probes=4)
        for _ in range(3):
            x = torch.randn(8, 3)
            outputs = model(x)
            (outputs[1] if isinstance(outputs, tuple) else outputs.square().mean()).backward()
            with flerm.step(x), recorder.step(x):
                optimizer.step()
        assert not watch.skipped
        rates = [record.rates for record in recorder.records]
        return model.weight, rates, flerm.learning_rates(), [record.together for record in watch.records]

    (weight, *found), (same_weight, *same) = run(lambda y: (y, y.square().mean())), run(lambda y: y)
    assert torch.equal(weight, same_weight)
    assert found == same


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda y: (y, y.sum(0)), r"\(Tensor\[4, 2\], Tensor\[2\]\), .*: model\(\*inputs\[:2\]\)\[0\]"),
        (lambda y: (y.sum(), y), r"\(Tensor\[\], Tensor\[4, 2\]\), .*: model\(\*inputs\[:2\]\)\[1\]"),
        (lambda y: (y.sum(), None), r"\(Tensor\[\], None\)"),
        (lambda y: (y.long(), None), r"\(Tensor\[4, 2\], None\)"),
        (lambda y: [(y.sum(), y)], r"\(\(Tensor\[\], Tensor\[4, 2\]\)\), .*: model\(\*inputs\[:2\]\)\[0\]\[1\]"),
        (lambda y: {"features": y}, r"dict with 'features', .*: model\(\*inputs\[:2\]\)\['features'\]"),
        (lambda y: None, "None, "),
    ],
)
def test_outputs_that_are_not_sure_are_refused_with_the_line_that_picks_them(make, said):
    model, x = SeveralResults(make), torch.randn(4, 3)
    update = {"weight": torch.ones(2, 3)}
    with pytest.raises(LayerwiseError, match=f"the model returned {said}"):
        function_space_rates(model, update, (x, x, x), probes=2)
    with pytest.raises(LayerwiseError, match=r"forward returned .*: return the output tensor"):
        function_space_rates(model, update, x, probes=2, forward=lambda model, x: model(x))


def test_the_line_that_an_error_gives_picks_the_outputs():
    torch.manual_seed(0)
    model, x = SeveralResults(lambda y: (y, y.sum(0))), torch.randn(4, 3)
    update = {"weight": torch.ones(2, 3)}
    expected = function_space_rates(model, update, x, probes=2, forward=lambda model, x: model(x)[0])
    for inputs in (x, (x,), (x, x, x), {"x": x}):
        with pytest.raises(LayerwiseError) as raised:
            function_space_rates(model, update, inputs, probes=2)
        line = str(raised.value).partition("forward=")[2].rpartition(", or")[0]
        assert function_space_rates(model, update, inputs, probes=2, forward=eval(line))["weight"] == expected["weight"]


class Force(nn.Module):
    """A force field: it differentiates an energy by its inputs in its forward."""

    def __init__(self, width=8):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x):
        x = x.clone().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_a_forward_that_differentiates_is_measured_in_all_ways_watched_and_checked():
    torch.manual_seed(0)
    model, x = Force(), torch.randn(8, 3)
    update = {name: 1e-4 * p.detach() for name, p in model.named_parameters()}
    exact = function_space_rates(model, update, x, method="exact")
    whole = function_space_rates(model, update, x, method="difference", linear=None)
    assert {name: rate.value for name, rate in whole.items()} == pytest.approx(
        {name: rate.value for name, rate in exact.items()}, rel=1e-2, abs=1e-7
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = lw.watch(model, optimizer, every=1, function_space_every=2)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    assert not watch.skipped
    assert watch.records[-1].together.moved > 0
    checked = lw.check(Force, (8, 16), lambda m: torch.optim.SGD(m.parameters(), lr=0.1), (x, x), steps=(1,), seeds=(0,))
    assert "energy.2" in str(checked)


class Sparse(nn.Linear):
    def forward(self, x, edges):
        return torch.sparse.mm(edges, super().forward(x))


def test_a_graph_with_sparse_edges_is_whole_when_it_is_watched():
    model, x, edges = Sparse(3, 2), torch.randn(8, 3), torch.eye(8).to_sparse()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = lw.watch(model, optimizer, every=1, function_space_every=2)
    for _ in range(2):
        model(x, edges).square().mean().backward()
        optimizer.step()
    assert not watch.skipped


def test_a_model_without_a_forward_is_told_to_say_how_it_runs():
    model, x = nn.ModuleDict({"actor": nn.Linear(3, 2), "critic": nn.Linear(3, 1)}), torch.randn(8, 3)
    update = {name: p.detach() for name, p in model.named_parameters()}
    said = "ModuleDict has no forward: give forward=lambda model, inputs: "
    with pytest.raises(LayerwiseError, match=said):
        function_space_rates(model, update, x)
    with pytest.warns(UserWarning, match=said):
        lw.param_groups(model, x)


def test_an_update_of_what_is_frozen_is_told():
    """As between two checkpoints that nobody trains any more."""
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(LayerwiseError, match=r"update holds frozen parameters alone \(weight\): give .* requires_grad=True"):
        function_space_rates(model, {"weight": torch.ones(2, 3)}, torch.randn(8, 3))


def test_a_loader_in_place_of_a_batch_is_told():
    model, loader = nn.Linear(3, 2), torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=4)
    with pytest.raises(LayerwiseError, match=r"the batch is a DataLoader: give one of its batches, next\(iter\(loader\)\)"):
        function_space_rates(model, {"weight": torch.ones(2, 3)}, loader)
    with pytest.warns(UserWarning, match="the batch is a DataLoader: give one"):
        lw.param_groups(model, loader)


class Features(nn.Linear):
    """Its one argument and its result are dicts, as sentence-transformers' are."""

    def forward(self, features):
        return {**features, "embedding": super().forward(features["x"]), "state": features["x"].cumsum(1)}


def test_a_dict_is_the_one_argument_of_a_forward_that_takes_no_keywords():
    model, batch = Features(4, 3), {"x": torch.randn(8, 4), "kind": "text"}
    update = {"weight": torch.randn(3, 4)}
    with pytest.raises(LayerwiseError, match=r"pass forward=lambda model, inputs: model\(inputs\)\["):
        function_space_rates(model, update, batch)
    of_dict = function_space_rates(model, update, batch, forward=lambda m, inputs: m(inputs)["embedding"])
    assert of_dict["weight"] == function_space_rates(nn.Linear(4, 3), update, batch["x"])["weight"]


def test_a_dict_with_an_entry_too_many_is_told_by_the_model():
    update, batch = {"weight": torch.randn(3, 4)}, {"input": torch.randn(8, 4), "mask": torch.ones(8)}
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):  # not that its input is a dict
        function_space_rates(nn.Linear(4, 3), update, batch)


def test_a_traced_model_takes_a_dict_though_it_has_no_signature():
    model, inputs, update = nn.Linear(4, 3), torch.randn(8, 4), {"weight": torch.randn(3, 4)}
    of_traced = function_space_rates(torch.jit.trace(model, inputs), update, {"input": inputs})
    assert of_traced["weight"].value == pytest.approx(function_space_rates(model, update, inputs)["weight"].value)
