"""State of several parameters as parts of one tensor.

To put many small tensors together at every step, and the new ones back, takes longer than to compute them. So it is done
once, where a step is planned, and holds while the state stays where it was put.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_, itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.optim.work.job import Job, State


class JoinedState(NamedTuple):
    """A flat tensor whose parts, in order, are the state of some parameters under a key."""

    whole: Tensor
    parts: list[Tensor]
    states: list[State]
    key: str

    def holds(self) -> bool:
        """Whether they still are: users put other tensors there, and some programs other memory under a tensor."""
        in_place = all(map(is_, self.parts, map(itemgetter(self.key), self.states)))
        return in_place and _memory(self.parts[0]) == _memory(self.whole) == _memory(self.parts[-1])


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def join_state(jobs: Sequence[Job], key: str) -> JoinedState | None:
    """Make the state under a key of some parameters, in their order, parts of one new tensor.

    None where it is left as it is: in a compiled step, of sharded parameters, on several devices or in several dtypes, and
    where it lies side by side with state of others, which would keep all of that memory alive.
    """
    own = [job.state[key] for job in jobs]
    alike = len({(tensor.dtype, tensor.device) for tensor in own}) == 1
    if torch.compiler.is_compiling() or not alike or any(job.local is not job.param for job in jobs):
        return None
    before = [tensor for tensor in own if tensor._base is not None]
    bases = {id(tensor._base): tensor._base for tensor in before}
    if sum(base.numel() for base in bases.values()) != sum(tensor.numel() for tensor in before):
        return None
    whole = torch.cat([tensor.flatten() for tensor in own])
    parts = [part.view(old.shape) for part, old in zip(whole.split([t.numel() for t in own]), own, strict=True)]
    states = [job.state for job in jobs]
    for state, part in zip(states, parts, strict=True):
        state[key] = part
    return JoinedState(whole, parts, states, key)
