"""Decoders of the transformers library: what they have in common, GPT-2 and Llama."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn

from layerwise.errors import LayerwiseError
from layerwise.lab.models import family
from layerwise.lab.models.family import Axis, Examples, Family, Settings, register

#: Settings that the data and the training loop decide.
_OURS = {"vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}


class TransformersFamily(Family):
    """A decoder of transformers.

    Attributes:
        classes: names of its config's and its model's class.
        positions: what it calls its longest sequence.
    """

    classes: ClassVar[tuple[str, str]]
    positions: ClassVar[str]

    def setting_defaults(self) -> dict[str, Any]:
        return family.keywords_of(self._classes()[0], _OURS)

    def _classes(self) -> list[Any]:
        import transformers  # when they are asked for: it takes seconds

        return [getattr(transformers, name) for name in self.classes]

    def build(self, settings: Settings, examples: Examples, attention: str) -> nn.Module:
        """Its longest sequence is the data's unless the settings have one."""
        family.tokens_only(examples, "this model")
        positions = settings.setdefault(self.positions, examples.seq_len)
        if isinstance(positions, int) and positions < examples.seq_len:
            raise LayerwiseError(
                f"model.{self.positions}={positions} is shorter than data.seq_len={examples.seq_len}:"
                " raise the one or lower the other"
            )
        from huggingface_hub.errors import StrictDataclassError  # how transformers refuses a setting's type

        config_class, model_class = self._classes()
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
        try:
            made = config_class(vocab_size=examples.vocab_size, **settings, **ends)
        except StrictDataclassError as error:
            raise TypeError(str(error)) from None
        made._attn_implementation = attention
        return model_class(made)

    def resize(self, settings: Settings, axis: Axis, value: float) -> Settings:
        """Heads keep their size and grow in number."""
        if axis == "width":
            return self.widened(settings, value)
        if axis == "depth":
            return {self.layers[0]: family.whole("depth", value)}
        return {"initializer_range": settings["initializer_range"] * value}

    @abstractmethod
    def widened(self, settings: Settings, value: float) -> Settings:
        """The settings that change for a hidden size."""


# Pretraining on more text than is seen twice needs no dropout.
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@register
class GPT2(TransformersFamily):
    """transformers' GPT2LMHeadModel."""

    name, blocks, layers, positions = "gpt2", "transformer.h.*", ("n_layer",), "n_positions"
    classes = "GPT2Config", "GPT2LMHeadModel"
    presets = {  # noqa: RUF012 - declared in the base class
        "gpt2-tiny": {"n_layer": 4, "n_embd": 128, "n_head": 4, **_NO_DROPOUT},
        "gpt2-small": {"n_layer": 12, "n_embd": 768, "n_head": 12, **_NO_DROPOUT},
        "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16, **_NO_DROPOUT},
    }

    def widened(self, settings: Settings, value: float) -> Settings:
        head = family.size_of_heads(settings["n_embd"], settings["n_head"])
        return {"n_embd": family.whole("width", value), "n_head": family.whole("width", value, head)}


_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def _sized(*sizes: int) -> Settings:
    return dict(zip(_SIZES, sizes, strict=True))


@register
class Llama(TransformersFamily):
    """transformers' LlamaForCausalLM."""

    name, blocks, layers = "llama", "model.layers.*", ("num_hidden_layers",)
    positions, classes = "max_position_embeddings", ("LlamaConfig", "LlamaForCausalLM")
    presets = {  # noqa: RUF012 - declared in the base class
        "llama-tiny": _sized(4, 128, 352, 4, 2),
        "llama-0.5b": _sized(24, 1280, 3456, 20, 20),
        "llama-1.1b": _sized(22, 2048, 5632, 32, 4),
    }

    def widened(self, settings: Settings, value: float) -> Settings:
        """With the heads, the groups grow that share keys and values."""
        old, heads = settings["hidden_size"], settings["num_attention_heads"]
        groups = family.size_of_heads(heads, settings["num_key_value_heads"] or heads)
        new_heads = family.whole("width", value, family.size_of_heads(old, heads))
        return {
            "hidden_size": family.whole("width", value),
            "num_attention_heads": new_heads,
            "num_key_value_heads": max(1, new_heads // groups),
            "intermediate_size": round(settings["intermediate_size"] * value / old),
        }
