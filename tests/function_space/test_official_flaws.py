"""Each way in which the official procedure goes wrong, beside ours (what it goes wrong on is in `naive.py`).

Elsewhere: permuted groups, per-group rates, LambdaLR, resuming and the redone step in `test_matching.py`; padding and half
precision in `test_estimates_against_exact.py`; traces left in `test_recording_leaves_no_trace.py`.
"""

import copy
import math
import warnings

import pytest
import torch
from naive import NaiveFLeRM
from small_models import ResNet, backward, batch, weights
from torch import nn

from layerwise.errors import LayerwiseError
from layerwise.function_space import BaseRates, FLeRM, FunctionSpaceRecorder, function_space_rates


def singles(model, lr=1e-2, kind=torch.optim.Adam):
    """One group per parameter: the naive procedure knows no other."""
    return kind([{"params": [p]} for p in model.parameters()], lr=lr)


def naive_step(model, optimizer, probes=3, base=None, x=None, y=None, other=None, step=None):
    naive = NaiveFLeRM(model, optimizer, base or [0.1] * len(list(model.parameters())), 1e-2)
    nn.functional.cross_entropy(model(x), y).backward()
    naive.save_weights()
    (step or optimizer.step)()
    for probe in range(probes):
        naive.call(other, modify=probe == probes - 1)
    return naive


class Adapter(nn.Module):
    """LoRA at step 0: `B = 0`, so that A has no gradient and no effect."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.A = nn.Parameter(torch.randn(4, 12))
        self.B = nn.Parameter(torch.zeros(5, 4))

    def forward(self, x):
        return x[:, :5] + x @ self.A.T @ self.B.T


class DeadUnits(nn.Module):
    """A ReLU layer that never fires: its input weights have neither gradient nor effect."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dead = nn.Linear(12, 4)
        nn.init.constant_(self.dead.bias, -100.0)
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        return self.out(torch.cat([x, self.dead(x).relu()], 1))


class ZeroProjection(nn.Module):
    """A residual branch whose last projection starts at zero, as many initialisations do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(12, 8)
        self.down = nn.Linear(8, 12)
        self.out = nn.Linear(12, 5)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        return self.out(x + self.down(self.up(x).relu()))


class UnusedExpert(nn.Module):
    """Two experts, of which no row of the data goes to the second: its gradient is there, and is 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.out = nn.Linear(12, 5)

    def forward(self, x):
        second = x[:, 0] > 100
        h = torch.zeros_like(x)
        for expert, rows in zip(self.experts, (~second, second), strict=True):
            h = h.index_add(0, rows.nonzero()[:, 0], expert(x[rows]))
        return self.out(h)


@pytest.mark.parametrize(
    ("build", "without"),
    [
        (Adapter, {"A"}),
        (DeadUnits, {"dead.weight", "dead.bias"}),
        (ZeroProjection, {"up.weight", "up.bias"}),
        (UnusedExpert, {"experts.1.weight", "experts.1.bias"}),
    ],
)
def test_a_rate_of_zero_keeps_its_learning_rate(build, without):
    x, y, other = batch(0)
    model = build()
    optimizer = singles(model)
    naive_step(model, optimizer, x=x, y=y, other=other)
    lrs = dict(zip((n for n, _ in model.named_parameters()), (g["lr"] for g in optimizer.param_groups), strict=True))
    assert {n for n, lr in lrs.items() if not math.isfinite(lr)} >= without  # base / 0, or 0 / 0
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not all(torch.isfinite(p).all() for p in model.parameters())  # and then inf * 0

    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    flerm = FLeRM(model, optimizer, "uniform")
    for t in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with flerm.step(other):
                optimizer.step()
        assert len(caught) == (t == 0)  # said once
    assert set(flerm.reports[0].left_alone) == without
    assert "does not reach the outputs" in str(flerm.reports[0])
    assert all(flerm.learning_rates()[name] == 1e-2 for name in without)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("how", ["skipped", "lr 0"])
def test_a_step_without_an_update_is_not_matched(how):
    """A step skipped by GradScaler, or a warm-up that starts at 0."""
    x, y, other = batch(0)
    model = ResNet(8, 1)
    optimizer = singles(model, lr=0.0 if how == "lr 0" else 1e-2)
    step = (lambda: None) if how == "skipped" else optimizer.step
    naive_step(model, optimizer, x=x, y=y, other=other, step=step)
    assert not any(math.isfinite(group["lr"]) for group in optimizer.param_groups)

    model = ResNet(8, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0 if how == "lr 0" else 1e-2)
    flerm = FLeRM(model, optimizer, "uniform")
    nn.functional.cross_entropy(model(x), y).backward()
    before = weights(model)
    with flerm.step(other):
        if how == "lr 0":
            optimizer.step()
    assert flerm.reports == []
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())
    optimizer.param_groups[0]["lr"] = 1e-2
    with flerm.step(other):
        optimizer.step()
    assert len(flerm.reports) == 1


class Attention(nn.Module):
    """Softmax does not see what is added to every key alike: the rate of the key bias is exactly 0."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(20, 16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 20)
        self.to(dtype)

    def forward(self, x):
        h = self.emb(x)
        attended = nn.functional.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h))
        return self.out(h + attended)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_biases_do_not_get_noise_over_noise(dtype):
    tokens = torch.randint(0, 20, (4, 10), generator=torch.Generator().manual_seed(0))
    model = Attention(dtype)
    optimizer = singles(model, lr=2.0**-7, kind=torch.optim.SGD)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    naive = NaiveFLeRM(model, optimizer, [1.0] * 9, 1e-2)
    naive.save_weights()
    optimizer.step()
    naive.call(tokens, modify=True)
    lrs = dict(zip(naive.params, (group["lr"] for group in optimizer.param_groups), strict=True))
    assert lrs["key.bias"] > 30 * lrs["query.bias"]

    model = Attention(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-7)
    flerm = FLeRM(model, optimizer, "uniform")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=r"key\.bias"), flerm.step(tokens):
        optimizer.step()
    assert list(flerm.reports[0].left_alone) == ["key.bias"]
    assert flerm.learning_rates()["key.bias"] == 2.0**-7


def test_permuted_groups():
    """Naive: rates go by position. Ours by name is in `test_matching.py`."""
    x, y, other = batch(0)
    base = [0.01 * (i + 1) for i in range(6)]
    found = []
    for order in (1, -1):
        model = ResNet(8, 1)
        optimizer = torch.optim.Adam([{"params": [p]} for p in list(model.parameters())[::order]], lr=1e-2)
        torch.manual_seed(0)
        naive_step(model, optimizer, 1, base, x, y, other)
        found.append({id(g["params"][0]): g["lr"] for g in optimizer.param_groups}[id(model.inp.weight)])
    assert found[1] != pytest.approx(found[0], rel=0.1)


def test_lambda_schedules():
    """Naive: the first scheduler step writes base_lr * ratio over the matched rates."""
    x, y, other = batch(0)
    model = ResNet(8, 1)
    optimizer = singles(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    naive_step(model, optimizer, 1, None, x, y, other)
    assert len({g["lr"] for g in optimizer.param_groups}) == 6
    schedule.step()
    assert {g["lr"] for g in optimizer.param_groups} == {1e-2}


def test_one_outer_rate_for_all_groups():
    """Naive: two groups tuned to different rates are both sent to the one outer rate."""
    x, y, other = batch(0)
    lrs = []
    for factor in (1.0, 10.0):
        model = ResNet(8, 1)
        optimizer = singles(model)
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        torch.manual_seed(0)
        naive_step(model, optimizer, 1, None, x, y, other)
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs[0] == pytest.approx(lrs[1], rel=1e-2)  # the tuned tenfold rate is gone


def test_exact_weights_discard_the_matched_step():
    """Naive: new rates from step 1 on; the step that was matched stays at the unmatched rates."""
    x, y, other = batch(0)
    model = ResNet(8, 1)
    naive_step(model, singles(model), 1, [1e-6] * 6, x, y, other)
    kept = max((p - q).abs().max().item() for p, q in zip(model.parameters(), ResNet(8, 1).parameters(), strict=True))
    assert kept == pytest.approx(1e-2, rel=1e-3)  # Adam's first step is lr

    model = ResNet(8, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    flerm = FLeRM(model, optimizer, "uniform")
    backward(model, 0)
    with flerm.step(other):
        optimizer.step()
    fresh = dict(ResNet(8, 1).named_parameters())
    for name, p in model.named_parameters():
        moved = (p - fresh[name]).abs().max().item()
        assert moved == pytest.approx(flerm.learning_rates()[name], rel=1e-3)


def test_resuming_does_not_inflate_the_rates():
    """Naive: the EMA is saved, its count of calls is not, so the bias correction is applied twice."""
    x, y, other = batch(0)
    model = ResNet(8, 1)
    naive = naive_step(model, singles(model), 10, None, x, y, other)
    before = naive.delta["inp.weight"]
    naive.calls = 0
    for group in naive.optimizer.param_groups:
        group["lr"] = 1e-2
    naive.call(other, modify=False)
    assert naive.delta["inp.weight"] > 2 * before

    model = ResNet(8, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    recorders = [FunctionSpaceRecorder(model, optimizer, every=1) for _ in range(2)]
    recorders[0].steps = 7
    recorders[1].load_state_dict(recorders[0].state_dict())  # nothing of a record lives in the recorder's state
    backward(model, 0)
    with recorders[0].step(other), recorders[1].step(other):
        optimizer.step()
    assert recorders[0].records[0].rates == recorders[1].records[0].rates


def test_records_do_not_remember_earlier_steps():
    """The published curves are mostly the EMA's memory: a rate that falls to 0 seems to decay by sqrt(0.9) a step."""
    x, y, other = batch(0)
    model = ResNet(8, 1)
    optimizer = singles(model, kind=torch.optim.SGD)
    naive = NaiveFLeRM(model, optimizer, [0.1] * 6, 1e-2)
    recorder = FunctionSpaceRecorder(model, optimizer, every=1)
    theirs = []
    for factor in (1.0, 1e-6, 1e-6):
        optimizer.zero_grad()
        (factor * nn.functional.cross_entropy(model(x), y)).backward()
        naive.save_weights()
        with recorder.step(other):
            optimizer.step()
        naive.call(other, modify=False)
        theirs.append(naive.delta["inp.weight"])
    ours = [record.rates["inp.weight"].value for record in recorder.records]
    assert theirs[2] > 0.3 * theirs[0]
    assert ours[1] < 1e-4 * ours[0]


def test_accumulated_gradients_survive_the_measurement():
    x, y, other = batch(0)
    model = ResNet(8, 1)
    optimizer = singles(model)
    naive_step(model, optimizer, 1, None, x, y, other)
    garbage = model.inp.weight.grad.clone()

    model = ResNet(8, 1)
    nn.functional.cross_entropy(model(x), y).backward()
    expected = model.inp.weight.grad.clone()
    update = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    function_space_rates(model, update, other)
    assert torch.equal(model.inp.weight.grad, expected)
    assert not torch.allclose(garbage, expected, rtol=0.1)


def test_frozen_and_unused_parameters_and_one_group():
    x, y, other = batch(0)

    def odd():
        model = ResNet(8, 2)
        model.blocks[0].weight.requires_grad_(False)
        model.spare = nn.Linear(3, 3)
        return model

    model = odd()
    with pytest.raises((TypeError, AttributeError)):  # p.grad is None
        naive_step(model, singles(model), 1, None, x, y, other)
    model = ResNet(8, 2)
    with pytest.raises(ValueError, match="zip"):  # one group
        naive_step(model, torch.optim.Adam(model.parameters()), 1, None, x, y, other)

    model = odd()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    flerm = FLeRM(model, optimizer, "uniform")
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="spare"), flerm.step(other):
        optimizer.step()
    assert set(flerm.reports[0].left_alone) == {"spare.weight", "spare.bias"}
    assert "blocks.0.weight" not in flerm.learning_rates()


def test_a_missing_key_is_named():
    small = ResNet(8, 1)
    optimizer = torch.optim.Adam(small.parameters(), lr=1e-2)
    recorder = FunctionSpaceRecorder(small, optimizer)
    backward(small, 0)
    with recorder.step(batch(0)[2]):
        optimizer.step()
    base = BaseRates.of(recorder)
    model = ResNet(8, 1)
    model.extra = nn.Linear(5, 5)
    with pytest.raises(LayerwiseError, match=r"no rate for 2 parameters \('extra.weight', 'extra.bias'\)"):
        FLeRM(model, torch.optim.Adam(model.parameters(), lr=1e-2), base)


def test_optimizers_that_are_not_proportional_to_lr_are_refused():
    """The naive formula divides by lr whatever the optimizer does with it."""
    model = ResNet(8, 1)
    parameters = list(model.parameters())
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    refused = [
        torch.optim.LBFGS(parameters),
        torch.optim.Adafactor(parameters),
        pytorch_optimizer.AdaFactor(parameters, relative_step=True),
        pytorch_optimizer.Prodigy(parameters),
        pytorch_optimizer.ScheduleFreeAdamW(parameters),
        pytorch_optimizer.DAdaptAdam(parameters),
    ]
    for optimizer in refused:
        with pytest.raises(LayerwiseError, match="proportional to lr"):
            FLeRM(model, optimizer, "uniform")
    # And they are: Adafactor's first step at twice the rate is not twice the step.
    steps = []
    for lr in (0.8, 1.6):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.Adafactor(twin.parameters(), lr=lr)
        backward(twin, 0)
        optimizer.step()
        steps.append((twin.inp.weight - model.inp.weight).norm().item())
    assert steps[1] < 1.5 * steps[0]


def test_moments_in_half_precision_do_not_underflow():
    """Naive: `dW * g` is squared in float16, whose smallest number is 6e-8: no rate is left, and base / 0 is inf."""
    _, _, other = batch(0, torch.float16)
    model = ResNet(8, 1, dtype=torch.float16)
    update = {n: torch.full_like(p, 2.0**-14) for n, p in model.named_parameters()}
    naive = NaiveFLeRM(model, singles(model, kind=torch.optim.SGD), [1.0] * 6, 1e-2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(update[name])
    naive.call(other, modify=False)
    assert naive.delta["inp.weight"] == 0 or not math.isfinite(naive.delta["inp.weight"])

    fresh = ResNet(8, 1, dtype=torch.float16)
    ours = function_space_rates(fresh, update, other)
    full = function_space_rates(copy.deepcopy(fresh).float(), {n: u.float() for n, u in update.items()}, other.float())
    # Gradients differ by roundings to float16, 5e-4.
    assert ours["inp.weight"].value == pytest.approx(full["inp.weight"].value, rel=0.01)


def test_model_outputs_of_transformers():
    """Naive: `eps * outputs` of a `ModelOutput` is no tensor."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6)
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(0, 11, (2, 6))
    naive = NaiveFLeRM(model, singles(model), [1.0] * len(list(model.parameters())), 1e-2)
    with pytest.raises(TypeError):
        naive.call(tokens, modify=False)
    update = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    assert function_space_rates(model, update, tokens, probes=2)["transformer.wte.weight"].value > 0


def test_the_output_layers_own_formula():
    """Official: it crashes. Ours: `exact`, which is that formula's value on logits, and stays right behind a log-softmax.

    The formula: `sum over k of (sum over j of Z_kj)^2`, and `sum over k of Z_k^2` for the bias, averaged over probes.
    """
    _, _, other = batch(0, torch.float64)
    model = ResNet(8, 1, dtype=torch.float64)
    update = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    leaves = [model.out.weight, model.out.bias]
    exact = {forward: function_space_rates(model, update, other, forward, "exact") for forward in ("output", "log_softmax")}
    found = {}
    for forward in exact:
        outputs = model(other) if forward == "output" else model(other).log_softmax(-1)
        sums = torch.zeros(2, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        for _ in range(400):
            eps = torch.randint(0, 2, outputs.shape, generator=generator).double() * 2 - 1
            weight, bias = torch.autograd.grad(outputs, leaves, eps / outputs.numel() ** 0.5, retain_graph=True)
            sums[0] += (update["out.weight"] * weight).sum(1).square().sum() / 400
            sums[1] += (update["out.bias"] * bias).square().sum() / 400
        found[forward] = sums.sqrt().tolist()
    # Squares of 5 classes and 400 probes: 1 / sqrt(2 * 5 * 400) = 1.6 % a standard error, here four of them.
    for value, name in zip(found["output"], ("out.weight", "out.bias"), strict=True):
        assert value == pytest.approx(exact["output"][name].value, rel=0.064)
    h = model.inp(other)
    moved = (h + model.blocks[0](h.relu())) @ update["out.weight"].T
    assert exact["output"]["out.weight"].value == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-12)
    truth = (moved - (model(other).softmax(-1) * moved).sum(-1, keepdim=True)).square().mean().sqrt().item()
    # The log-softmax is taken in float32.
    assert exact["log_softmax"]["out.weight"].value == pytest.approx(truth, rel=1e-6)
    assert found["log_softmax"][0] / truth - 1 < -0.04  # the formula's own bias there, beyond the error of 400 probes


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts numbers read from tensors, each a synchronisation with a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_cost_of_more_probes(monkeypatch):
    """Naive: a forward, and a read of every tensor's rate, for each probe; ours: one forward and no read."""
    from layerwise.function_space.measuring import measurement

    # On the CPU, after the one transfer.
    monkeypatch.setattr(measurement, "combine", lambda _, moments, *args: [(1.0, 0.1)] * len(moments))
    _, _, other = batch(0)
    counts = {}
    for probes in (4, 8):
        for depth in (1, 3):
            model = ResNet(8, depth)
            calls = []
            model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            naive = NaiveFLeRM(model, singles(model), [1.0] * len(list(model.parameters())), 1e-2)
            with Reads() as theirs:
                for _ in range(probes):
                    naive.call(other, modify=False)
            assert len(calls) == probes
            assert theirs.count >= probes * len(list(model.parameters()))
            calls.clear()
            update = {n: torch.ones_like(p) for n, p in model.named_parameters()}
            with Reads() as ours:
                function_space_rates(model, update, other, probes=probes, slices=1)
            assert len(calls) == 1
            counts[probes, depth] = ours.count
    assert len(set(counts.values())) == 1


def test_the_copy_of_the_weights_is_freed_after_the_measurement():
    """Naive: it stands for ever."""
    import gc
    import weakref

    from layerwise.function_space.steps import watched_step

    x, y, other = batch(0)
    model = ResNet(8, 1)
    optimizer = singles(model)
    copies = []
    start = watched_step.WatchedStep.__init__

    def watched(self, *args):
        start(self, *args)
        copies.extend(weakref.ref(old) for old in self.old.values())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watched_step.WatchedStep, "__init__", watched)
        recorder = FunctionSpaceRecorder(model, optimizer, every=1, probes=4)
        nn.functional.cross_entropy(model(x), y).backward()
        with recorder.step(other):
            optimizer.step()
    gc.collect()
    assert len(copies) == 6
    assert not any(copy() is not None for copy in copies)
    naive = naive_step(model, optimizer, 1, None, x, y, other)
    assert sum(p.numel() for p in naive.saved.values()) == sum(p.numel() for p in model.parameters())
