"""Small questions about modules, asked without importing the libraries that define them."""

from __future__ import annotations

from torch import nn


def is_hf_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is stored ``[in, out]``."""
    return hasattr(module, "nf") and any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers")
        for base in type(module).__mro__
    )


def is_linear(module: nn.Module) -> bool:
    """A projection of vectors to vectors."""
    return isinstance(module, nn.Linear) or is_hf_conv1d(module)


def is_norm(module: nn.Module) -> bool:
    """A normalisation: its parameters are gains and biases whatever their shape."""
    known = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    return isinstance(module, known) or (
        "norm" in type(module).__name__.lower() and next(module.children(), None) is None
    )


def holds_lora(module: nn.Module | None) -> bool:
    """A layer with a low-rank adapter (peft's LoraLayer, loralib): it has both factors."""
    return hasattr(module, "lora_A") and hasattr(module, "lora_B")
