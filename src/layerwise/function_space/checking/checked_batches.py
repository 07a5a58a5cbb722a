"""The batches that every size trains and is measured on, and what is done with one by default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.outputs import model_output
from layerwise.function_space.steps.step_loss import model_loss


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
    """On `(inputs, targets)` cross-entropy for whole numbers, else the squared error; else what the model itself says.

    Raises:
        LayerwiseError: targets of another shape than the outputs, or a model that says nothing.
    """
    if not _is_pair(batch):
        return model_loss(model, batch)
    result, targets = model_output(model, batch[0]), batch[1]
    outputs = result[0] if isinstance(result, tuple) else result
    whole = not targets.is_floating_point()
    if targets.numel() != (outputs[..., 0] if whole else outputs).numel():
        raise LayerwiseError(
            f"the outputs have shape {tuple(outputs.shape)}, the targets {tuple(targets.shape)}: give "
            "loss=lambda model, batch: ..., or as batch a dict of keywords for which the model returns a loss"
        )
    if whole:
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    return functional.mse_loss(outputs, targets.reshape(outputs.shape))


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
