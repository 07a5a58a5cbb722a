"""What noise references note between the backward passes and the step: halves of a batch, and replicas' own gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.common.tensors import dense, local_part
from layerwise.errors import LayerwiseError
from layerwise.optim.rules.rule import needs_replicas
from layerwise.optim.work.job import Group, Job, State, local_state
from layerwise.optim.work.local import MatrixWork

if TYPE_CHECKING:  # it is slow to import
    from layerwise.optim.work.replicas import CommHook, Replicas

_NOT_AVERAGED = (
    "hold_half: the processes hold different gradients, so they have not been averaged and the weights would drift apart: "
    "leave no_sync before the last backward() of each half, or use reference='replicas'"
)
_NO_HALVES = (
    "noise reference 'independent' compares two halves of the accumulated batch: call optimizer.hold_half() after the first "
    "half's backward(), or use reference='previous'"
)


class SecondGradients:
    """Gradients beside the one of the step, for ``NoiseAdaptive``'s ``"independent"`` and ``"replicas"``."""

    def __init__(self) -> None:
        self._halves = 0  # of this batch that have been noted
        self._halves_agree = False  # until the processes were asked
        self._replicas: Replicas | None = None
        self.needed = False  # whether any rule looks at them

    def look(self, jobs: Sequence[Job]) -> None:
        """Find out whether a rule of these parameters needs second gradients."""
        self.needed = any("half_difference" in job.state or needs_replicas(job.group) for job in jobs)

    def hold_half(self, groups: Sequence[Group], states: Mapping[Tensor, State], work: MatrixWork) -> None:
        """See ``LayerwiseOptimizer.hold_half``. Buffers go from A (after the first half) to 2 A - B (B: after both)."""
        rows = list(_half_buffers(groups, states))
        self._hold(rows)
        if not self._halves_agree:
            whole = [buffer for param, buffer in rows if local_part(param) is param]
            if whole:
                work.check_same(whole, _NOT_AVERAGED)
            self._halves_agree = True

    @torch.no_grad()
    def _hold(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._halves = self._halves % 2 + 1  # after both the next one is of another batch
        buffers = [buffer for _, buffer in rows]
        grads = [torch.zeros_like(b) if p.grad is None else local_part(p.grad) for p, b in rows]
        if buffers and self._halves == 1:
            torch._foreach_copy_(buffers, grads)
        elif buffers:
            torch._foreach_mul_(buffers, 2.0)
            torch._foreach_sub_(buffers, grads)

    def watch(self, optimizer: Any, model: nn.Module, comm_hook: CommHook | None, state: Any) -> None:
        """See ``LayerwiseOptimizer.watch_replicas``."""
        from layerwise.optim.work.replicas import Replicas

        watcher = self._replicas or Replicas(optimizer, needs_replicas)
        watcher.watch(model, comm_hook, state)
        self._replicas = watcher

    def before_step(
        self, moving: Sequence[Job], groups: Sequence[Group], states: Mapping[Tensor, State], work: MatrixWork
    ) -> None:
        """Make what was noted ready for the rules."""
        if any("half_difference" in job.state for job in moving):
            if self._halves == 0:
                raise LayerwiseError(_NO_HALVES)
            if self._halves == 1:  # the second is what `.grad` holds now
                self._hold(list(_half_buffers(groups, states)))
        if self._replicas is None:
            return
        between = [job for job in moving if needs_replicas(job.group)]
        if between:
            found = self._replicas.deviations([(job.name, job.param) for job in between], work)
            for job, deviation in zip(between, found, strict=True):
                job.deviation = deviation

    def after_step(self) -> None:
        """The batch is over, whether its step was taken or skipped."""
        self._halves = 0
        if self._replicas is not None:
            self._replicas.next_turn()

    def forget(self) -> None:
        """The gradients were cleared."""
        self._halves = 0
        if self._replicas is not None:
            self._replicas.forget()

    def restart(self) -> None:
        """A checkpoint was loaded."""
        self._halves = 0
        if self._replicas is not None:
            self._replicas.restart()


def _half_buffers(groups: Sequence[Group], states: Mapping[Tensor, State]) -> Iterator[tuple[Tensor, Tensor]]:
    """``(parameter, its buffer)`` where halves are compared. Raises LayerwiseError for a sparse gradient."""
    for group in groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if "half_difference" in states[param]:
                if param.grad is not None:
                    dense(name, param.grad)
                yield param, local_state(param, states[param])["half_difference"]
