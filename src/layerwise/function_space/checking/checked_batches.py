"""The batches that every size trains and is measured on, and what is done with one by default."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.outputs import model_output
from layerwise.function_space.measuring.slices import each_tensor

#: `loss(model, batch)`, the loss of a training step.
Loss = Callable[[nn.Module, Any], Tensor]


def batches(batch: Any, steps: int) -> list[Any]:
    """Batches for `steps` training steps, one to match and one to measure on: the same for every size.

    Args:
        batch: one batch (a tensor, a tuple or a dict), taken every time; a function of the step, from 0 on; or anything that
            yields batches (a list, a DataLoader), gone through again where it is too short.
        steps: how many training steps there are.

    Raises:
        LayerwiseError: there is no batch.
    """
    count = steps + 2
    if isinstance(batch, (Tensor, tuple, Mapping)):
        return [batch] * count
    if callable(batch):
        return [batch(step) for step in range(count)]
    if not isinstance(batch, Iterable):
        raise LayerwiseError(
            f"batch is {type(batch).__name__}: give a tensor, a tuple, a dict, a function of the step or a DataLoader"
        )
    found = list(islice(batch, count))
    if not found:
        raise LayerwiseError("batch yields nothing: give at least one batch")
    return [found[index % len(found)] for index in range(count)]


def inputs_of(batch: Any) -> Any:
    """The model's inputs in a batch: the first of `(inputs, targets)`, else the batch itself."""
    return batch[0] if _is_pair(batch) else batch


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own `.loss` on a dict; on `(inputs, targets)` cross-entropy for whole numbers, else the squared error.

    Raises:
        LayerwiseError: for any other batch.
    """
    if isinstance(batch, Mapping):
        loss = getattr(model(**batch), "loss", None)
        if isinstance(loss, Tensor):
            return loss
    elif _is_pair(batch):
        result = model_output(model, batch[0])
        outputs, targets = (result[0] if isinstance(result, tuple) else result), batch[1]
        if targets.is_floating_point():
            return functional.mse_loss(outputs, targets.reshape(outputs.shape))
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    raise LayerwiseError(
        f"no loss is known for a batch of type {type(batch).__name__}: give loss=, a function of the model and the batch"
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    return each_tensor(batch, lambda tensor: tensor.to(device))


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
