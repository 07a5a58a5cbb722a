"""Decoders of the transformers library: what they have in common, GPT-2 and Llama."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn

from layerwise.errors import LayerwiseError
from layerwise.lab.models.family import (
    Axis,
    Examples,
    Family,
    Settings,
    keywords_of,
    register,
    size_of_heads,
    tokens_only,
    whole,
)  # fmt: skip

#: Settings that the data and the training loop decide.
_OURS = {"vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}


class TransformersFamily(Family):
    """A decoder of transformers.

    Attributes:
        positions: what it calls its longest sequence.
    """

    positions: ClassVar[str]

    @abstractmethod
    def classes(self) -> tuple[Any, Any]:
        """Its config's and its model's class, imported when they are asked for."""

    def setting_defaults(self) -> dict[str, Any]:
        return keywords_of(self.classes()[0], _OURS)

    def build(self, settings: Settings, examples: Examples, attention: str) -> nn.Module:
        """Its longest sequence is the data's unless the settings have one."""
        tokens_only(examples, "this model")
        positions = settings.setdefault(self.positions, examples.seq_len)
        if isinstance(positions, int) and positions < examples.seq_len:
            raise LayerwiseError(
                f"model.{self.positions}={positions} is shorter than data.seq_len={examples.seq_len}:"
                " raise the one or lower the other"
            )
        from huggingface_hub.errors import StrictDataclassError  # how transformers refuses a setting's type

        config_class, model_class = self.classes()
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
        try:
            made = config_class(vocab_size=examples.vocab_size, **settings, **ends)
        except StrictDataclassError as error:
            raise TypeError(str(error)) from None
        made._attn_implementation = attention
        return model_class(made)


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
            head = size_of_heads(settings["n_embd"], settings["n_head"])
            return {"n_embd": whole("width", value), "n_head": whole("width", value, head)}
        if axis == "depth":
            return {"n_layer": whole("depth", value)}
        return {"initializer_range": settings["initializer_range"] * value}


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
            return {"initializer_range": settings["initializer_range"] * value}
        old, heads = settings["hidden_size"], settings["num_attention_heads"]
        groups = size_of_heads(heads, settings["num_key_value_heads"] or heads)
        new_heads = whole("width", value, size_of_heads(old, heads))
        return {
            "hidden_size": whole("width", value),
            "num_attention_heads": new_heads,
            "num_key_value_heads": max(1, new_heads // groups),
            "intermediate_size": round(settings["intermediate_size"] * value / old),
        }
