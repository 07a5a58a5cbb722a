"""Steps shared out between two processes.

The group takes tensors of the device alone, as NCCL's does; what is on the host needs one of gloo.
"""

from device import CONTROLS, batch, net, prepare, run, train  # first: it loads the device

# isort: split
import torch
import torch.distributed as dist
from tiny import make
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import layerwise as lw

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "broadcast",
    "all_to_all_single",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_gather_single",
    "reduce_scatter_single",
)


def only_of_its_devices(collective):
    """Fails where a tensor is on a device that the group does not take."""

    def call(*args, **kwargs):
        backends = str(dist.get_backend_config(kwargs.get("group")))
        for given in (*args, *kwargs.values()):
            for tensor in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(tensor, torch.Tensor) and tensor.device.type not in backends:
                    raise ValueError(f"a tensor on {tensor.device} over {backends}")
        return collective(*args, **kwargs)

    return call


def all_gather_object(found, mine, group=None):
    if "cpu" not in str(dist.get_backend_config(group)):
        raise ValueError("objects over a group of devices: they travel as tensors, and the host waits for them")
    found[:] = [mine] * len(found)


def prepare_processes():
    """The first of two."""
    dist.init_process_group("cuda:fake", rank=0, world_size=2, store=FakeStore())
    for name in filter(dist.__dict__.__contains__, COLLECTIVES):
        setattr(dist, name, only_of_its_devices(getattr(dist, name)))
    dist.all_gather_object = all_gather_object
    new_group = dist.new_group
    dist.new_group = lambda ranks=None, backend=None, **options: new_group(ranks, backend="cpu:fake", **options)


def replicated(name):
    model = net()
    train(make(name, model), model)


def sharded(name):
    model = net()
    for module in (model.up, model.down, model.conv, model.head, model):
        fully_shard(module, mesh=MESH)
    train(make(name, model), model)


def measured():
    model = net()
    update = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    lw.function_space_rates(model, update, batch(), probes=4)


def host_tensor():
    dist.all_reduce(torch.zeros(2))


def cases():
    """Name -> what is done, and the devices that may be read."""
    for name in ("muon", "scion", "lanton", "dual-muon", "namo", "lanton-momentum"):
        yield f"{name}, replicated", (lambda n=name: replicated(n), ("cpu",))
    for name in ("muon", "scion", "lanton", "dual-muon", "namo"):
        yield f"{name}, sharded", (lambda n=name: sharded(n), ("cpu",))
    yield "measured", (measured, ("cpu", "cuda"))
    yield "control: a host tensor", (host_tensor, ("cpu", "cuda"))
    yield from CONTROLS.items()


prepare()
prepare_processes()
MESH = init_device_mesh("cuda", (2,))
run(cases())
