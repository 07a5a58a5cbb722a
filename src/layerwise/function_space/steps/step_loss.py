"""The loss of a training step that is taken here: what a user's function, or the model itself, says it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from layerwise.common.running import call_given
from layerwise.errors import LayerwiseError

#: `loss(model, batch)`, the loss of a training step.
Loss = Callable[[nn.Module, Any], Tensor]


def given_loss(function: Loss, model: nn.Module, batch: Any) -> Tensor:
    """The loss by a function that a user gave as `loss=`.

    Raises:
        LayerwiseError: the function is one of outputs and targets, such as torch's `cross_entropy`, or gives no loss.
    """
    needed = (
        "the model and a batch; one of outputs and targets is given as loss=lambda model, batch: "
        "function(model(batch[0]), batch[1])"
    )
    loss = call_given("loss", function, model, batch, needed=needed)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise LayerwiseError(f"loss= returned {kind}: return one number that can go backward, such as a mean over the batch")
    return loss


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """What the model itself says of a dict of keywords: its `.loss`, or the one number in a tuple, as nanoGPT's.

    Raises:
        LayerwiseError: it says nothing.
    """
    result = model(**batch) if isinstance(batch, Mapping) else None
    parts = result if isinstance(result, (tuple, list)) else [getattr(result, "loss", None)]
    if isinstance(result, Mapping):
        parts = [result.get("loss")]
    losses = [part for part in parts if isinstance(part, Tensor) and part.numel() == 1 and part.requires_grad]
    if len(losses) != 1:
        kind = type(batch).__name__
        raise LayerwiseError(
            f"the model gives no loss for a batch of type {kind}: give loss=lambda model, batch: ..., or a dict of keywords "
            "with the labels for which the model returns one"
        )
    return losses[0]
