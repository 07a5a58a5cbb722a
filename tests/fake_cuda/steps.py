"""Steps and measurements on a device of type "cuda" that is none. `python steps.py LIBRARY` prints a line for each.

Tensors have shapes, dtypes and devices but no numbers. An operation on tensors of two devices fails, as it would on a GPU,
and so does a step of an optimizer that reads a number. Measurements may read: there every number is 1.
"""

import ctypes
import sys
import warnings
from contextlib import nullcontext

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch looks for devices

import torch  # noqa: E402
from tiny import make  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import layerwise as lw  # noqa: E402

ATEN = torch.ops.aten


class Event:
    """Never arrives: what would be read of it is not there."""

    def record(self):
        pass

    def query(self):
        return False


class Ones(TorchDispatchMode):
    """Every number that the host reads is 1, every comparison of tensors true."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is ATEN._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if function is ATEN.equal.default:
            return True
        return function(*args, **(kwargs or {}))


class Net(nn.Module):
    """A table, positions, norms, matrices, a convolution, experts and a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.positions = nn.Parameter(torch.zeros(8, 16))
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.experts = nn.Parameter(torch.randn(4, 16, 16))
        self.head = nn.Linear(16, 32, bias=False)

    def forward(self, tokens):
        h = self.table(tokens) + self.positions
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        h = h + self.conv(h.mT).mT
        return self.head(h + torch.einsum("btd,edf->btf", h, self.experts))


def net(dtype=torch.float32, device="cuda"):
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Net()
    finally:
        torch.set_default_dtype(torch.float32)


def batch():
    return torch.zeros(2, 8, dtype=torch.long, device="cuda")


def backward(model):
    tokens = batch()
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()


def train(optimizer, model, steps=5):
    """Rules that measure at every fourth of five steps do so twice."""
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.hold_half()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_steps(name, dtype, **options):
    model = net(dtype)
    train(make(name, model, **options), model)


def rates_on_the_device(name):
    model = net()
    optimizer = make(name, model)
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), 0.01, device="cuda")
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
    for _ in range(2):
        with recorder.step(batch()):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()


def matched(kind):
    model = net()
    optimizer = ANY[kind](model)
    flerm = lw.FLeRM(model, optimizer, every=1, probes=4)
    for _ in range(2):
        with flerm.step(batch()):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()


def watched(kind):
    model = net()
    optimizer = ANY[kind](model)
    lw.watch(model, optimizer, every=1, function_space_every=2)
    for _ in range(3):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()


def measured(method):
    model = net()
    update = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    lw.function_space_rates(model, update, batch(), method=method, probes=4)


def mixed_devices():
    torch.zeros(2, device="cuda") + torch.zeros(2)


def a_step_that_reads():
    bool(torch.zeros(2, device="cuda").sum())


ANY = {
    "lanton": lambda model: lw.Lanton(lw.param_groups(model)),
    "dual-muon": lambda model: lw.DualMuon(lw.param_groups(model)),
    "adamw": lambda model: torch.optim.AdamW(model.parameters()),
    "capturable adamw": lambda model: torch.optim.AdamW(
        model.parameters(), lr=torch.tensor(0.1, device="cuda"), capturable=True
    ),
}


def cases():
    """Name -> what is done, and whether it may read numbers."""
    for name in ("muon", "scion", "lanton", "dual-muon", "namo", "lanton-momentum", "lanton-independent", "lanton-bf16"):
        yield name, lambda n=name: optimizer_steps(n, torch.float32), False
    for name in ("lanton", "dual-muon"):
        yield f"{name}, weights in bfloat16", lambda n=name: optimizer_steps(n, torch.bfloat16), False
        yield f"{name}, skip", lambda n=name: optimizer_steps(n, torch.float32, nonfinite="skip"), False
        yield f"{name}, rates on the device", lambda n=name: rates_on_the_device(n), False
        yield f"{name}, resumed", lambda n=name: resumed_from_a_processor(n), True
    for which in (lw.RowNorm(), lw.ColNorm(), lw.Frobenius(), lw.Sign()):
        yield f"{which}", lambda g=which: geometry(g), False
    yield "roles", roles, True
    for method in ("full_cov", "iid"):
        yield f"measured, {method}", lambda m=method: measured(m), True
    for kind in ANY:
        yield f"{kind}, recorded", lambda k=kind: recorded(k, slices=2), True
        yield f"{kind}, matched", lambda k=kind: matched(k), True
        yield f"{kind}, watched", lambda k=kind: watched(k), True
    yield "control: two devices", mixed_devices, True
    yield "control: a number", a_step_that_reads, False


def main():
    torch.cuda.Event = Event
    torch.cuda.get_rng_state = lambda device=0: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda state, device=0: None
    torch.cuda._lazy_init = lambda: None
    torch.cuda.current_device = lambda: 0
    empty_like = torch.empty_like
    torch.empty_like = lambda t, **kw: empty_like(t, **{**kw, "pin_memory": False})
    warnings.simplefilter("ignore")
    for name, run, may_read in cases():
        try:
            with FakeTensorMode(), Ones() if may_read else nullcontext():
                run()
        except Exception as error:
            print("FAILED", name, type(error).__name__, str(error).partition("\n")[0], sep=" | ", flush=True)
        else:
            print("passed", name, sep=" | ", flush=True)


main()
