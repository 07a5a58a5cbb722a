"""Where the work on whole matrices happens unless a user says otherwise."""

from __future__ import annotations

import torch.distributed as dist

from layerwise.optim.work.job import MatrixWork
from layerwise.optim.work.local import LocalWork


def default_work() -> MatrixWork:
    """Over all processes where torch.distributed is initialised with more than one, else on this one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from layerwise.optim.work.distributed import DistributedWork

        return DistributedWork()
    return LocalWork()
