"""A GPU that is none: what the scripts beside this one share. Import it first. `python SCRIPT LIBRARY cuda|mps`.

Tensors have shapes, dtypes and devices but no numbers. An operation on tensors of two devices fails, as it would on a GPU,
and so does what reads a number of the device, where that is not allowed, and float64 on Apple's.
"""

import ctypes
import sys
import warnings

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch looks for devices

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from layerwise.optim import guard, rounding  # noqa: E402

ATEN = torch.ops.aten
DEVICE = sys.argv[2]


class Event:
    """Never arrives: what would be read of it is not there."""

    def record(self):
        pass

    def query(self):
        return False


class Readable(TorchDispatchMode):
    """Every number that is read of these devices is 1, every comparison of tensors true."""

    def __init__(self, *devices):
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (ATEN._local_scalar_dense.default, ATEN.equal.default) and args[0].device.type in self.devices:
            return 1.0 if args[0].dtype.is_floating_point and function is not ATEN.equal.default else 1
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "mps" and tensor.dtype == torch.float64:
                raise TypeError("float64 on a device that has none")
        return found


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
        self.wide = nn.Sequential(nn.Linear(16, 80), nn.Linear(80, 80), nn.Linear(80, 16))  # whose noise is estimated
        self.experts = nn.Parameter(torch.randn(4, 16, 16))
        self.head = nn.Linear(16, 32, bias=False)

    def forward(self, tokens):
        h = self.table(tokens) + self.positions
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        h = h + self.conv(h.mT).mT + self.wide(h)
        return self.head(h + torch.einsum("btd,edf->btf", h, self.experts))


def net(dtype=torch.float32, device=DEVICE):
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Net()
    finally:
        torch.set_default_dtype(torch.float32)


def batch():
    return torch.zeros(2, 8, dtype=torch.long, device=DEVICE)


def train(optimizer, model, steps=5):
    """Rules that measure at every fourth of five steps do so twice."""
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.hold_half()
        optimizer.step()
        optimizer.zero_grad()


def mixed_devices():
    torch.zeros(2, device=DEVICE) + torch.zeros(2)


def a_number():
    bool(torch.zeros(2, device=DEVICE).sum())


def float64():
    torch.zeros(2, device=DEVICE).double()


#: Name -> what is done, and the devices that may be read.
CONTROLS = {
    "control: two devices": (mixed_devices, ("cpu", DEVICE)),
    "control: a number": (a_number, ("cpu",)),
    "control: float64": (float64, ("cpu",)),
}


def prepare():
    """What torch's Python asks of a device, and that no step looks whether its gradients were finite: flags never arrive."""
    guard.WITH_EVENTS = rounding.WITH_EVENTS = (DEVICE,)
    torch.cuda.Event = Event
    torch.cuda.get_rng_state = lambda device=0: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda state, device=0: None
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda._get_device_properties = lambda device: None
    torch.cuda._lazy_init = lambda: None
    torch.cuda.current_device = lambda: 0
    empty_like = torch.empty_like
    torch.empty_like = lambda t, **kw: empty_like(t, **{**kw, "pin_memory": False})
    warnings.simplefilter("ignore")


def run(cases):
    """A line for each case, with the error if there is one."""
    for name, (do, readable) in cases:
        try:
            with FakeTensorMode(), Readable(*readable):
                do()
        except Exception as error:
            print("FAILED", name, type(error).__name__, str(error).partition("\n")[0], sep=" | ", flush=True)
        else:
            print("passed", name, sep=" | ", flush=True)
