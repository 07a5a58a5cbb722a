"""The matrix work of a step over many processes: data parallel, FSDP2 (sharded DTensors) and both together."""

from layerwise.optim.distributed.work import DistributedWork

__all__ = ["DistributedWork"]
