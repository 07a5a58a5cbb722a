"""Starting from the weights of an earlier run, and training low-rank adapters on them (LoRA, by peft)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from layerwise.errors import LayerwiseError
from layerwise.lab.runs.checkpoint import list_checkpoints, load_checkpoint

if TYPE_CHECKING:
    from layerwise.lab.config.schema import LoraConfig


def load_weights(model: nn.Module, run: str) -> None:
    """Loads the weights of a run's newest checkpoint. Raises LayerwiseError."""
    checkpoints = list_checkpoints(Path(run).expanduser() / "checkpoints")
    if not checkpoints:
        raise LayerwiseError(f"model.start={run}: no checkpoint there; name the folder of a run that has one")
    try:
        model.load_state_dict(load_checkpoint(checkpoints[0])["model"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LayerwiseError(f"model.start={run} is a run of another model: {reason}") from None


def add_adapters(model: nn.Module, config: LoraConfig) -> nn.Module:
    """The model with adapters, everything else frozen; A from a normal distribution, B at 0 unless it is fixed.

    Raises LayerwiseError.
    """
    import peft

    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=config.targets, init_lora_weights="gaussian"
    )
    try:
        with warnings.catch_warnings():
            # peft sees by itself that GPT-2's weights are (in, out), and calls an old name.
            warnings.filterwarnings("ignore", "fan_in_fan_out|`is_gradient_checkpointing`")
            adapted = peft.get_peft_model(model, settings)
    except (ValueError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LayerwiseError(
            f"model.lora.targets={config.targets}: {reason}; name modules of the model, such as [query, value]"
        ) from None
    if config.fixed is not None:
        for name, parameter in adapted.named_parameters():
            if f"lora_{config.fixed}" in name:
                parameter.requires_grad_(False)
                if config.fixed == "B":  # at 0 it would keep A from learning
                    nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return adapted
