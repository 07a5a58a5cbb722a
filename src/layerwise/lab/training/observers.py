"""What can look at, or take part in, a training run without being part of the loop."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise.lab.data.batches import Batch
    from layerwise.lab.training.trainer import Trainer


class Observer:
    """Hooks of a training run; each does nothing until it is overridden. Each process has its own: they must do the same."""

    def begin(self, trainer: Trainer) -> None:
        """Once, after everything is built and a checkpoint, if any, is loaded."""

    def around_step(self, step: int, batch: Batch) -> AbstractContextManager[Any]:
        """Entered before `optimizer.step()`, left after it. Gradients are final: clipped.

        `step` counts from 1: the step being taken. `batch` is this process's whole batch of the step.
        """
        return nullcontext()

    def multiplier(self, parameter: str) -> float:
        """What this observer multiplies the learning rate of a parameter by, beyond its group and layer rate."""
        return 1.0

    def after_step(self, step: int) -> None:
        """After the scheduler moved and gradients were cleared."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, kept in every checkpoint: those of the first process."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave, before `begin`."""
