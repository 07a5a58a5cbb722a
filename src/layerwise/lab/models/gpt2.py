"""GPT-2."""

from __future__ import annotations

from typing import Any

from layerwise.lab.models.family import Axis, Settings, register, size_of_heads, whole
from layerwise.lab.models.from_transformers import TransformersFamily

# Pretraining on more text than is seen twice needs no dropout.
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@register
class GPT2(TransformersFamily):
    """transformers' GPT2LMHeadModel."""

    name, blocks, layers, positions = "gpt2", "transformer.h.*", ("n_layer",), "n_positions"
    presets = {  # noqa: RUF012 - declared in the base class
        "gpt2-tiny": {"n_layer": 4, "n_embd": 128, "n_head": 4, **_NO_DROPOUT},
        "gpt2-small": {"n_layer": 12, "n_embd": 768, "n_head": 12, **_NO_DROPOUT},
        "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16, **_NO_DROPOUT},
    }

    def classes(self) -> tuple[Any, Any]:
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2Config, GPT2LMHeadModel

    def resize(self, settings: Settings, axis: Axis, value: float) -> Settings:
        """Heads keep their size and grow in number."""
        if axis == "width":
            head = size_of_heads(settings.get("n_embd", 768), settings.get("n_head", 12))
            return {"n_embd": whole("width", value), "n_head": whole("width", value, head)}
        if axis == "depth":
            return {"n_layer": whole("depth", value)}
        return {"initializer_range": settings.get("initializer_range", 0.02) * value}
