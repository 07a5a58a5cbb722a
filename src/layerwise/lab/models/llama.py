"""Llama."""

from __future__ import annotations

from typing import Any

from layerwise.lab.models.family import Axis, Settings, register, size_of_heads, whole
from layerwise.lab.models.from_transformers import TransformersFamily


def _shape(layers: int, hidden: int, intermediate: int, heads: int, groups: int) -> Settings:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }


@register
class Llama(TransformersFamily):
    """transformers' LlamaForCausalLM."""

    name, blocks, layers = "llama", "model.layers.*", ("num_hidden_layers",)
    positions = "max_position_embeddings"
    presets = {  # noqa: RUF012 - declared in the base class
        "llama-tiny": _shape(4, 128, 352, 4, 2),
        "llama-0.5b": _shape(24, 1280, 3456, 20, 20),
        "llama-1.1b": _shape(22, 2048, 5632, 32, 4),
    }

    def classes(self) -> tuple[Any, Any]:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaConfig, LlamaForCausalLM

    def resize(self, settings: Settings, axis: Axis, value: float) -> Settings:
        """Heads keep their size and grow in number, with them the groups that share keys and values."""
        if axis == "depth":
            return {"num_hidden_layers": whole("depth", value)}
        if axis == "init_scale":
            return {"initializer_range": settings.get("initializer_range", 0.02) * value}
        old, heads = settings.get("hidden_size", 4096), settings.get("num_attention_heads", 32)
        groups = size_of_heads(heads, settings.get("num_key_value_heads") or heads)
        new_heads = whole("width", value, size_of_heads(old, heads))
        return {
            "hidden_size": whole("width", value),
            "num_attention_heads": new_heads,
            "num_key_value_heads": max(1, new_heads // groups),
            "intermediate_size": round(settings.get("intermediate_size", 11008) * value / old),
        }
