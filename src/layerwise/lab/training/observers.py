"""What can look at, or take part in, a training run without being part of the loop."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

    from layerwise.lab.config.schema import Config
    from layerwise.lab.data.batches import Batch, Batches
    from layerwise.lab.runs.directory import RunWriter


class Training(Protocol):
    """A run as observers see it.

    Attributes:
        config: complete.
        model: not wrapped; its parameters are DTensors under FSDP2.
        optimizer: as the loop steps it.
        data: `batch(step)` is the whole batch of a step, counted from 0.
        device: of this process.
        rank, world: of several processes, this one's number and how many there are.
        writer: its `append("function_space", row)` adds a record.
        step: optimizer steps taken.
    """

    config: Config
    model: nn.Module
    optimizer: Optimizer
    data: Batches
    device: torch.device
    rank: int
    world: int
    writer: RunWriter
    step: int


class Observer:
    """Hooks of a training run; each does nothing until it is overridden. Each process has its own: they must do the same."""

    def begin(self, trainer: Training) -> None:
        """Once, after everything is built and a checkpoint, if any, is loaded."""

    def around_step(self, step: int, batch: Batch) -> AbstractContextManager[Any]:
        """Entered before `optimizer.step()`, left after it. Gradients are final: unscaled and clipped.

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
