"""One look at a model: with the user's batch, with one made for it, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from layerwise.common.parameter_names import unwrap
from layerwise.geometry.forward.evidence import Evidence
from layerwise.geometry.forward.made_batch import made_batch
from layerwise.geometry.forward.watched_forward import Forward, call, watch


@dataclass(frozen=True)
class Look:
    """What a forward pass showed, None where there was none, and one line on why there was none."""

    evidence: Evidence | None
    said: str = ""


def look(model: nn.Module, batch: Any = None, forward: Forward | None = None) -> Look:
    """Run the model once on the batch and watch its parameters.

    Args:
        model: the model, wrapped or not. Nothing of it changes.
        batch: what the model takes: a tensor, a tuple of arguments, or a dict of keywords. None makes a small one for
            transformers' models where that is safe.
        forward: `forward(model, batch)` runs the model instead of a plain call.

    Returns:
        The evidence; where the model cannot be run, none, and a line that says why.
    """
    inner = unwrap(model)
    given = batch is not None or forward is not None
    if not given:
        try:
            batch = made_batch(inner)
        except Exception:  # a config without the numbers that a batch is made of
            return Look(None)
        if batch is None:
            return Look(None)
    try:
        evidence = watch(inner, batch, forward or call)
    except Exception as error:  # whatever a user's model raises
        first = (str(error).splitlines() or [""])[0][:200]
        tried = "the batch" if given else "a batch made for it"
        return Look(
            None,
            f"the model did not run on {tried} ({type(error).__name__}: {first}): roles are those of the modules",
        )
    if given:
        evidence.of_unseen = "took no part in the forward pass"
    return Look(evidence)
