"""What every torch optimizer promises."""

import math
import re
import warnings

import pytest
import torch
from tiny import OPTIMIZERS, assert_same_bits, loss_of, make, net, set_gradients, take_step, tensors, twin

import layerwise as lw
from layerwise.optim.state.following import move_beside

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@every_optimizer
def test_gradients_are_read_and_never_changed(name):
    model = net()
    optimizer = make(name, model)
    for step in range(3):
        take_step(optimizer, model, step)
        used = {n: p.grad for n, p in model.named_parameters()}
        take_step(optimizer, model, step + 10)  # nor by the step after
        set_gradients(model, step)
        for n, p in model.named_parameters():
            assert torch.equal(p.grad, used[n]), n


@every_optimizer
def test_training_lowers_the_loss(name):
    model = net()
    optimizer = make(name, model, lr=2**-12 if name.startswith("scion") else 0.01)
    first = loss_of(model).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model).div(2).backward()
        optimizer.hold_half()
        loss_of(model).div(2).backward()
        optimizer.step()
    assert loss_of(model).item() < first - 0.1


@pytest.mark.parametrize("clear", [lambda grad: grad.zero_(), lambda grad: grad.fill_(math.nan)])
def test_the_gradient_of_the_step_before_is_a_copy(clear):
    """Training loops zero gradients in place, or let the next backward overwrite them."""
    plain, clearing = net(), net()
    optimizers = [make("lanton", plain), make("lanton", clearing)]
    for step in range(4):
        for model, optimizer in zip((plain, clearing), optimizers, strict=True):
            set_gradients(model, step)
            optimizer.step()
        for p in clearing.parameters():
            clear(p.grad)
    assert_same_bits(tensors(plain, optimizers[0]), tensors(clearing, optimizers[1]))


@every_optimizer
def test_a_parameter_without_a_gradient_is_neither_stepped_nor_decayed(name):
    model = net()
    optimizer = make(name, model, weight_decay=0.5)
    take_step(optimizer, model, 0)
    before = tensors(model, optimizer)
    without = ("up.weight", "norm.bias", "embed.weight")
    take_step(optimizer, model, 1, skip=without)
    after = tensors(model, optimizer)
    of_them = {k: v for k, v in before.items() if k.startswith(without)}
    # its multiplier is a comparison with the units that did change; the halves' buffer is scratch
    assert_same_bits(of_them, {k: after[k] for k in of_them}, but=("multiplier", "half_difference"))
    assert not torch.equal(before["down.weight"], after["down.weight"])


def test_decay_is_decoupled_and_at_the_groups_rate():
    """The same step but for a factor 1 - lr * decay, whatever the unit's own multiplier is."""
    models = [net(torch.float64) for _ in range(2)]
    optimizers = [make("lanton", m, lr=0.01, weight_decay=d) for m, d in zip(models, (0.0, 0.5), strict=True)]
    for step in range(3):
        starts = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]
        for model, optimizer in zip(models, optimizers, strict=True):
            set_gradients(model, step)
            optimizer.step()
        for n, p in models[1].named_parameters():
            plain = models[0].get_parameter(n) - starts[0][n]
            kept = 1 - 0.01 * 0.5 if p.ndim > 1 else 1.0  # gains and biases are not decayed
            torch.testing.assert_close(p.detach(), starts[1][n] * kept + plain, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lanton-independent"])
def test_closure(name):
    model, other = net(), net()
    optimizer, plain = make(name, model), make(name, other)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    value = optimizer.step(closure)
    assert value.requires_grad  # it ran with gradients on, under step's no_grad
    loss_of(other).backward()
    assert plain.step() is None
    assert_same_bits(tensors(model, optimizer), tensors(other, plain))


@pytest.mark.parametrize("name", ["dual-muon", "lanton"])
def test_a_step_under_autocast_is_the_step_without_and_the_closure_has_it(name):
    weights = []
    for autocast in (False, True):
        model = net()
        optimizer = make(name, model)
        for step in range(3):
            set_gradients(model, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                assert optimizer.step(lambda: torch.is_autocast_enabled("cpu")) is autocast
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_closure_can_hold_halves():
    model = net()
    optimizer = make("lanton-independent", model)

    def closure():
        optimizer.zero_grad()
        loss_of(model, 0).div(2).backward()
        optimizer.hold_half()
        loss_of(model, 1).div(2).backward()

    optimizer.step(closure)
    assert all(rate.squared_norm > 0 for rate in optimizer.layer_rates().values())


@every_optimizer
def test_lr_as_a_tensor_equals_lr_as_a_float(name):
    model, other = net(torch.float64), net(torch.float64)
    lr = torch.tensor(0.01, dtype=torch.float64)
    optimizers = [make(name, model, lr=0.01), make(name, other, lr=lr)]
    for step in range(4):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            take_step(optimizer, m, step)
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(0.01 / (step + 2))
                elif group["lr"] != 3e-4:  # Muon's AdamW groups, whose rate is a float in both
                    group["lr"] = 0.01 / (step + 2)
    for (n, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        # AdamW's fused kernel (for tensors) and its loop differ in the order of a few roundings
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda m, n=n: f"{n} {m}")


def test_adamw_groups_with_a_tensor_lr_are_torchs_fused_adamw():
    model, other = net(), net()
    optimizer = lw.DMuon(lw.param_groups(model), lr=torch.tensor(1e-2))
    matrices = {"up.weight", "down.weight"}
    rest = {n: p for n, p in other.named_parameters() if n not in matrices}
    vectors = [p for p in rest.values() if p.ndim == 1]
    groups = [{"params": [p for p in rest.values() if p.ndim == 2]}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=torch.tensor(1e-2), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(5):
        set_gradients(model, step)
        set_gradients(other, step)
        optimizer.step()
        adamw.step()
    for n, p in other.named_parameters():
        if n not in matrices:
            assert torch.equal(p, model.get_parameter(n)), n


def test_a_tensor_of_one_entry_serves_a_scalar_parameter():
    scale = torch.nn.Parameter(torch.tensor(2.0))
    with pytest.warns(UserWarning, match="shape"):
        optimizer = lw.Scion([scale], lr=torch.tensor([0.5]))
    scale.grad = torch.tensor(-3.0)
    optimizer.step()
    assert scale.item() == 2.5


def test_zero_grad():
    model = net()
    optimizer = make("lanton", model)
    set_gradients(model, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_group_added_later_is_what_it_would_have_been_at_the_start():
    model, other = net(), net()
    groups = lw.param_groups(model)
    optimizer = lw.Muon(groups[:2], lr=0.01)
    for group in groups[2:]:
        optimizer.add_param_group(group)
    whole = lw.Muon(lw.param_groups(other), lr=0.01)
    for step in range(2):
        take_step(optimizer, model, step)
        take_step(whole, other, step)
    assert_same_bits(tensors(model, optimizer), tensors(other, whole))
    assert list(optimizer.layer_rates()) == list(whole.layer_rates())


def test_a_plain_group_added_later_is_split_by_shape():
    model = net()
    optimizer = make("lanton", model)
    matrix, vector = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))
    count = len(optimizer.param_groups)
    with pytest.warns(UserWarning, match="shape"):
        optimizer.add_param_group({"params": [matrix, vector], "lr": 0.5})
    added = optimizer.param_groups[count:]
    assert [group["role"] for group in added] == ["hidden", "vector"]
    assert {group["lr"] for group in added} == {0.5}
    with pytest.warns(UserWarning, match="shape"):
        optimizer.add_param_group({"params": torch.nn.Parameter(torch.randn(2))})
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert len(set(names)) == len(names) == 10


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    model = net()
    optimizer = make("muon", model)
    count, states = len(optimizer.param_groups), len(optimizer.state)
    bad = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3).to(torch.cfloat))]
    with pytest.raises(lw.LayerwiseError):
        optimizer.add_param_group({"params": bad})
    assert (len(optimizer.param_groups), len(optimizer.state)) == (count, states)
    take_step(optimizer, model, 0)


@pytest.mark.parametrize("give", [lambda m: m.parameters(), lambda m: m.named_parameters()])
def test_plain_parameters_warn_once_and_work(give):
    model = net()
    with pytest.warns(UserWarning, match="param_groups") as caught:
        optimizer = lw.Lanton(give(model))
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points at the user's line"
    before = twin(model)
    set_gradients(model, 0)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))
    assert len(optimizer.layer_rates()) == len(list(model.parameters()))


def test_named_parameters_keep_their_names():
    model = net()
    with pytest.warns(UserWarning, match="param_groups"):
        optimizer = lw.Lanton(model.named_parameters())
    assert set(optimizer.layer_rates()) == dict(model.named_parameters()).keys()


def test_groups_of_another_optimizer_can_be_given():
    model = net()
    optimizer = make("lanton", model)
    again = lw.Lanton(
        [{k: v for k, v in group.items() if k != "params"} | {"params": group["params"]} for group in
         optimizer.param_groups]
    )  # fmt: skip
    assert again.layer_rates().keys() == optimizer.layer_rates().keys()


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(name, dtype):
    model, reference = net(dtype), net(torch.float32)
    reference.load_state_dict(model.state_dict())
    start = twin(reference)
    optimizers = [make(name, m, lr=2**-7) for m in (model, reference)]
    for step in range(3):
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            take_step(optimizer, m, step)
    for n, p in model.named_parameters():
        assert p.dtype == dtype
        way = reference.get_parameter(n) - start.get_parameter(n)
        off = p.float() - reference.get_parameter(n)
        # Weights of order one, rounded three times: bfloat16's spacing at 1 is 2^-7. Signs of entries near zero may
        # differ after that, which is why it is the norm that is compared.
        low = dtype in (torch.bfloat16, torch.float16)
        bound = 0.3 * way.norm() + (2**-8 * 3 * start.get_parameter(n).norm() if low else 0)
        assert off.norm() <= (bound if low else 1e-3 * way.norm()), n


def test_the_multiplier_of_a_bfloat16_matrix_is_not_rounded_to_bfloat16():
    """0.2 sqrt(max) of a bfloat16 matrix as without a rule, and a multiplier of 1 changes no bit."""
    models = [net(torch.bfloat16) for _ in range(2)]
    optimizers = [lw.Lanton(lw.param_groups(m), rates=rule) for m, rule in
                  zip(models, (None, lw.StaticRates()), strict=True)]  # fmt: skip
    for model, optimizer in zip(models, optimizers, strict=True):
        set_gradients(model, 0)
        optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@every_optimizer
def test_the_model_may_be_cast_after_the_optimizer_was_made(name):
    model = net()
    optimizer = make(name, model)
    take_step(optimizer, model, 0)
    model.bfloat16()
    take_step(optimizer, model, 1)
    model.double()
    take_step(optimizer, model, 2)
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in model.parameters())


def test_the_state_follows_its_parameter_to_another_device():
    state = {"momentum_buffer": torch.zeros(3), "multiplier": torch.ones(1), "note": "x"}
    move_beside(torch.empty(3, device="meta"), state)
    assert state["momentum_buffer"].device.type == state["multiplier"].device.type == "meta"
    assert state["note"] == "x"


@every_optimizer
def test_parameters_with_no_entries(name):
    empty = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((0, 5), (5, 0), (0,))]
    full = torch.nn.Parameter(torch.ones(3, 3))
    make_one = OPTIMIZERS[name] if name != "static" else lw.Lanton
    with pytest.warns(UserWarning, match="shape"):
        optimizer = make_one([*empty, full])
    for step in range(3):
        for p in empty:
            p.grad = torch.zeros_like(p)
        full.grad = torch.randn(3, 3, generator=torch.Generator().manual_seed(step))
        optimizer.hold_half()
        optimizer.step()
    assert full.isfinite().all()
    assert not torch.equal(full, torch.ones(3, 3))
    assert all(math.isfinite(rate.multiplier) for rate in optimizer.layer_rates().values())


@every_optimizer
def test_no_gradient_at_all(name):
    model = net()
    optimizer = make(name, model)
    before = tensors(model, optimizer)
    optimizer.step()
    assert_same_bits(before, tensors(model, optimizer))


def test_gradients_of_zero_decay_and_step_nowhere():
    model = net(torch.float64)
    optimizer = make("lanton", model, lr=0.01, weight_decay=0.5)
    before = twin(model)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for a, b in zip(before.parameters(), model.parameters(), strict=True):
        kept = (1 - 0.01 * 0.5) ** 3 if a.ndim > 1 else 1.0  # gains and biases are not decayed
        torch.testing.assert_close(b, a * kept, rtol=1e-14, atol=0)
    assert all(rate.multiplier == 1.0 for rate in optimizer.layer_rates().values())


@pytest.mark.parametrize("scale", [1e-18, 1e18])
@pytest.mark.parametrize("anchor", ["max", "mean"])
def test_the_rates_are_finite_at_any_scale_of_the_gradients(scale, anchor):
    """Squares of 1e-36 and 1e36, and their sums, at the ends of float32."""
    model = net()
    optimizer = lw.Lanton(lw.param_groups(model), rates=lw.NoiseAdaptive(anchor=anchor))
    for step in range(4):
        set_gradients(model, step, scale=scale)
        optimizer.step()
    for unit, rate in optimizer.layer_rates().items():
        assert 0 < rate.multiplier < 20, (unit, rate)
    assert all(p.isfinite().all() for p in model.parameters())


def replace_parameters(optimizer, model):
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(name) for name in group["param_names"]]


@every_optimizer
def test_parameters_that_a_framework_replaced_keep_their_state(name):
    model, replaced, untouched = net(), net(), net()
    optimizer, other = make(name, model), make(name, untouched)
    take_step(optimizer, model, 0)
    take_step(other, untouched, 0)
    replaced.load_state_dict(model.state_dict())
    replace_parameters(optimizer, replaced)
    for step in (1, 2):
        take_step(optimizer, replaced, step)
        take_step(other, untouched, step)
    assert optimizer.state.keys() == set(replaced.parameters())
    assert_same_bits(tensors(replaced, optimizer), tensors(untouched, other))


def test_state_that_cannot_be_kept_is_named():
    model = net()
    optimizer = make("lanton-independent", model)
    name = optimizer.param_groups[0]["param_names"][0]
    old = model.get_parameter(name)
    owner, _, last = name.rpartition(".")

    def replace_by(param):
        setattr(model.get_submodule(owner), last, torch.nn.Parameter(param))
        replace_parameters(optimizer, model)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_by(torch.cat([old, old], dim=1))  # before the first step there is nothing to keep
        optimizer.layer_rates()
        replace_by(old.detach().clone())
        take_step(optimizer, model, 0)
    moved = optimizer.state_dict()
    replace_by(torch.cat([old, old], dim=1))
    with pytest.warns(UserWarning, match=rf"momentum, noise\) of '{re.escape(name)}' begins afresh"):
        optimizer.layer_rates()
    replace_by(old.detach().clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(moved)
    assert optimizer.state[model.get_parameter(name)]["momentum_buffer"].any()
