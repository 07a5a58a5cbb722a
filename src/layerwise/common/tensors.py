"""What rooms share about tensors: scales to divide by, parts of sharded ones, two collectives under any of their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.errors import LayerwiseError


def or_one(scale: Tensor) -> Tensor:
    """A non-negative scale to divide by: itself, and 1 where it is zero."""
    return torch.where(scale > 0, scale, 1.0)


def largest_entry(tensor: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The largest absolute entry of all, or over `dim`, which is kept; without a tensor of absolute ones.

    A maximum and a minimum take a tenth of the time of a norm of order infinity.
    """
    if dim is None:
        low, high = tensor.aminmax()
    else:
        low, high = tensor.amin(dim, keepdim=True), tensor.amax(dim, keepdim=True)
    return torch.maximum(high, -low)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: float64, and float32 on Apple's, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """In the widest floating-point type of its device."""
    return tensor.to(wide_dtype(tensor.device))


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, told without importing torch.distributed.tensor, which is slow to."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor on the device of another, and sharded, or whole, as that is.

    A whole one must be the same on every process; one that is made whole is gathered, on all of them together.
    """
    tensor = tensor.to(like.device)
    if not is_sharded(like) and not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(tensor, DTensor):
        placed = (tensor.device_mesh, tensor.placements)
        if isinstance(like, DTensor) and placed == (like.device_mesh, like.placements):
            return tensor
        tensor = tensor.full_tensor()
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def dense(name: str, grad: Tensor) -> Tensor:
    """The gradient. Raises LayerwiseError for a sparse one."""
    if grad.layout != torch.strided:
        raise LayerwiseError(
            f"the gradient of {name!r} is sparse ({grad.layout}): a norm of the whole matrix needs a dense one; "
            "build the embedding with sparse=False"
        )
    return grad


def to_host(parts: Mapping[str, Tensor], exchange: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Tensors of numbers, in float64 on the CPU, in one copy; `exchange` is what processes do with all of them as one."""
    if not parts:
        return {}
    home = next((t.device for t in parts.values() if t.device.type != "cpu"), torch.device("cpu"))
    flat = torch.cat([t.detach().flatten().to(home, wide_dtype(home)) for t in parts.values()])
    pieces = exchange(flat).cpu().double().split([t.numel() for t in parts.values()])
    return {name: piece.reshape(t.shape) for piece, (name, t) in zip(pieces, parts.items(), strict=True)}


def all_gather_single(
    received: Tensor, sent: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """``torch.distributed.all_gather_single``: ``received`` holds ``sent`` of every process, in order."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(received, sent, group=group, async_op=async_op)
    return work


def reduce_scatter_single(received: Tensor, sent: Tensor, group: dist.ProcessGroup | None) -> None:
    """``torch.distributed.reduce_scatter_single``: this process's part of the sum of ``sent`` over all."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(received, sent, group=group)
