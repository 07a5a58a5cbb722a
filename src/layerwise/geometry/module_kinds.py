"""Small questions about modules, asked without importing the libraries that define them."""

from __future__ import annotations

import re
from typing import Any

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


#: Parts of a class's name that say more than "norm" does: `LayerNormLinear` holds a projection.
_MORE_THAN_NORM = ("linear", "mlp", "conv", "embed", "attention", "dense", "proj", "loss")
#: "Norm" as a word of its own, or at the end: `RMSNorm`, `layernorm`, `BatchNorm2d`, but not `EnormousTable`.
_NORM = re.compile(r"Norm(?![a-z])|norm$|^norm(?![a-z])")


def is_norm(module: nn.Module) -> bool:
    """A normalisation: its parameters are gains and biases whatever their shape."""
    return is_torch_norm(module) or _is_called_norm(module)


def is_torch_norm(module: nn.Module) -> bool:
    """A normalisation of torch."""
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase))


def _is_called_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    holds_more = any(part in name.lower() for part in _MORE_THAN_NORM)
    return bool(_NORM.search(name)) and not holds_more and next(module.children(), None) is None


def holds_lora(module: nn.Module | None) -> bool:
    """A layer with a low-rank adapter (peft's LoraLayer, loralib): it has both factors."""
    return hasattr(module, "lora_A") and hasattr(module, "lora_B")


def lora_factors(model: nn.Module) -> list[nn.Parameter]:
    """All factors of low-rank adapters in the model."""
    return [
        parameter
        for module in model.modules()
        if holds_lora(module)
        for name, parameter in module.named_parameters()
        if name.startswith(("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"))
    ]


def is_base_model(module: Any) -> bool:
    """A transformers model without a task: its class is not called "...For..." something."""
    prefix = getattr(module, "base_model_prefix", None)
    if not (isinstance(prefix, str) and prefix) or re.search("For[A-Z]", type(module).__name__):
        return False
    return getattr(module, "base_model", None) is module
