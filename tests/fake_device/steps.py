"""Steps and measurements."""

from device import CONTROLS, DEVICE, batch, net, prepare, run, train  # first: it loads the device

# isort: split
from contextlib import nullcontext

import torch
from tiny import make
from torch import nn

import layerwise as lw


def train_within(around, model, optimizer, steps):
    tokens = batch()
    for _ in range(steps):
        with around():
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()


def optimizer_steps(name, dtype, **options):
    model = net(dtype)
    train(make(name, model, **options), model)


def rates_on_the_device(name):
    model = net()
    optimizer = make(name, model)
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), 0.01, device=DEVICE)
    train(optimizer, model)


def resumed_from_a_processor(name):
    saved = make(name, net(device="cpu")).state_dict()
    model = net()
    optimizer = make(name, model)
    optimizer.load_state_dict(saved)
    train(optimizer, model)


def geometry(which):
    model = net()
    groups = lw.param_groups(model, overrides={"*": which})
    train(lw.Lanton(groups, rates=lw.NoiseAdaptive(alpha=0.1, anchor="mean", size_normalised=True)), model)


def roles():
    model = net()
    str(lw.describe(model, batch()))
    lw.param_groups(model, batch=batch())


def recorded(kind, **options):
    model = net()
    optimizer = ANY[kind](model)
    recorder = lw.FunctionSpaceRecorder(model, optimizer, every=1, probes=4, **options)
    train_within(lambda: recorder.step(batch()), model, optimizer, steps=2)


def matched(kind):
    model = net()
    optimizer = ANY[kind](model)
    flerm = lw.FLeRM(model, optimizer, every=1, probes=4)
    train_within(lambda: flerm.step(batch()), model, optimizer, steps=2)


def watched(kind):
    model = net()
    optimizer = ANY[kind](model)
    lw.watch(model, optimizer, every=1, function_space_every=2)
    train_within(nullcontext, model, optimizer, steps=3)


def measured(method):
    model = net()
    update = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    lw.function_space_rates(model, update, batch(), method=method, probes=4)


ANY = {
    "lanton": lambda model: lw.Lanton(lw.param_groups(model)),
    "dual-muon": lambda model: lw.DualMuon(lw.param_groups(model)),
    "adamw": lambda model: torch.optim.AdamW(model.parameters()),
    "capturable adamw": lambda model: torch.optim.AdamW(
        model.parameters(), lr=torch.tensor(0.1, device=DEVICE), capturable=True
    ),
}


def cases():
    """Name -> what is done, and the devices that may be read: steps do not wait for theirs."""
    for name in ("muon", "scion", "lanton", "dual-muon", "namo", "lanton-momentum", "lanton-independent", "lanton-bf16"):
        yield name, (lambda n=name: optimizer_steps(n, torch.float32), STEP)
    for name in ("lanton", "dual-muon"):
        yield f"{name}, weights in bfloat16", (lambda n=name: optimizer_steps(n, torch.bfloat16), STEP)
        yield f"{name}, skip", (lambda n=name: optimizer_steps(n, torch.float32, nonfinite="skip"), STEP)
        yield f"{name}, rates on the device", (lambda n=name: rates_on_the_device(n), STEP)
        yield f"{name}, resumed", (lambda n=name: resumed_from_a_processor(n), MEASUREMENT)
    for which in (lw.RowNorm(), lw.ColNorm(), lw.Frobenius(), lw.Sign()):
        yield f"{which}", (lambda g=which: geometry(g), STEP)
    yield "roles", (roles, MEASUREMENT)
    for method in ("full_cov", "iid"):
        yield f"measured, {method}", (lambda m=method: measured(m), MEASUREMENT)
    if DEVICE == "mps":
        del ANY["capturable adamw"]  # torch has it on CUDA alone
    for kind in ANY:
        yield f"{kind}, recorded", (lambda k=kind: recorded(k, slices=2), MEASUREMENT)
        yield f"{kind}, matched", (lambda k=kind: matched(k), MEASUREMENT)
        yield f"{kind}, watched", (lambda k=kind: watched(k), MEASUREMENT)
    yield from CONTROLS.items()


STEP, MEASUREMENT = ("cpu",), ("cpu", DEVICE)
prepare()
run(cases())
