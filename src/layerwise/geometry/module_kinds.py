"""Small questions about modules, asked without importing the libraries that define them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList


def is_hf_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is stored ``[in, out]``."""
    return hasattr(module, "nf") and any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers") for base in type(module).__mro__
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
    name = type(module).__name__
    holds_more = any(part in name.lower() for part in _MORE_THAN_NORM)
    called_so = bool(_NORM.search(name)) and not holds_more and next(module.children(), None) is None
    return is_torch_norm(module) or called_so


def is_torch_norm(module: nn.Module) -> bool:
    """A normalisation of torch."""
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase))


#: What the two factors are called: by peft and loralib, torchtune, kohya; peft's LoHa and LoKr have two products.
_FACTORS = (
    *(("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up")),
    *((f"{product}_b", f"{product}_a") for product in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2")),
)


def holds_lora(module: nn.Module | None) -> bool:
    """A layer with a low-rank adapter: it has both factors."""
    return any(hasattr(module, a) and hasattr(module, b) for a, b in _FACTORS)


def lora_factors(model: nn.Module) -> dict[int, str]:
    """Ids of all factors of low-rank adapters in the model -> "lora_A" or "lora_B"."""
    sides = {name: f"lora_{side}" for names in _FACTORS for name, side in zip(names, "AB", strict=True)}
    sides |= {f"lora_embedding_{side}": f"lora_{side}" for side in "AB"}  # peft's of an embedding
    factors: dict[int, str] = {}
    for module in model.modules():
        if holds_lora(module):
            named = ((name.partition(".")[0], p) for name, p in module.named_parameters())
            factors |= {id(p): sides[step] for step, p in named if step in sides}
        elif isinstance(module, ParametrizationList):
            factors |= _factors_made_here(module)
    return factors


def _factors_made_here(made: ParametrizationList) -> dict[int, str]:
    """The two matrices of a parametrization whose product has the shape of the weight that it is added to."""
    weight = next(made.parameters(recurse=False)).shape
    for module in made:
        matrices = [p for p in module.parameters(recurse=False) if p.ndim == 2]
        for a, b in (matrices, matrices[::-1]) if len(matrices) == 2 else ():
            if (*b.shape, *a.shape) == (weight[0], len(a), len(a), weight[-1]):
                return {id(a): "lora_A", id(b): "lora_B"}
    return {}


def is_base_model(module: Any) -> bool:
    """A transformers model without a task: its class is not called "...For..." something."""
    prefix = getattr(module, "base_model_prefix", None)
    if not (isinstance(prefix, str) and prefix) or re.search("For[A-Z]", type(module).__name__):
        return False
    return getattr(module, "base_model", None) is module
