"""Models by preset name: transformers' GPT-2 and Llama, randomly initialised, built without a network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.errors import LayerwiseError
from layerwise.lab.overrides import nearest

if TYPE_CHECKING:
    from layerwise.lab.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """A kind of decoder: its transformers classes, and what it calls its longest sequence."""

    config_class: Callable[[], Any]
    model_class: Callable[[], Any]
    positions: str

    def setting_names(self) -> set[str]:
        """Keywords of the architecture that a config may set."""
        parameters = inspect.signature(self.config_class()).parameters.values()
        own = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        return own - {"vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}


def _gpt2_config() -> Any:
    from transformers import GPT2Config

    return GPT2Config


def _gpt2_model() -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel


def _llama_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig


def _llama_model() -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM


FAMILIES = {
    "gpt2": Family(_gpt2_config, _gpt2_model, "n_positions"),
    "llama": Family(_llama_config, _llama_model, "max_position_embeddings"),
}

# Pretraining on more text than is seen twice needs no dropout.
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-tiny": ("gpt2", {"n_layer": 4, "n_embd": 128, "n_head": 4, **_NO_DROPOUT}),
    "gpt2-small": ("gpt2", {"n_layer": 12, "n_embd": 768, "n_head": 12, **_NO_DROPOUT}),
    "gpt2-medium": ("gpt2", {"n_layer": 24, "n_embd": 1024, "n_head": 16, **_NO_DROPOUT}),
    "llama-tiny": (
        "llama",
        {
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    "llama-0.5b": (
        "llama",
        {
            "num_hidden_layers": 24,
            "hidden_size": 1280,
            "intermediate_size": 3456,
            "num_attention_heads": 20,
            "num_key_value_heads": 20,
        },
    ),
    "llama-1.1b": (
        "llama",
        {
            "num_hidden_layers": 22,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
    ),
}


def model_settings(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The family and its settings: the preset's with the config's on top. Raises LayerwiseError."""
    if config.preset is None:
        family, settings = str(config.family), dict[str, Any]()
        if family not in FAMILIES:
            raise LayerwiseError(f"model.family={family!r}: {nearest(family, FAMILIES)}")
    elif config.preset in PRESETS:
        family, settings = PRESETS[config.preset]
    else:
        raise LayerwiseError(f"model.preset={config.preset!r}: {nearest(config.preset, PRESETS)}")
    valid = FAMILIES[family].setting_names()
    for key in config.settings:
        if key not in valid:
            raise LayerwiseError(
                f"unknown key `model.{key}`: {nearest(key, valid | set(type(config).model_fields))}"
            )
    return family, {**settings, **config.settings}


def build_model(config: ModelConfig, *, vocab_size: int, seq_len: int, seed: int) -> nn.Module:
    """A model in float32 on the CPU, initialised from `seed` alone; the global random state stays as it was.

    Its longest sequence is `seq_len` unless the config sets it. Raises LayerwiseError.
    """
    name, settings = model_settings(config)
    family = FAMILIES[name]
    positions = settings.setdefault(family.positions, seq_len)
    if isinstance(positions, int) and positions < seq_len:
        raise LayerwiseError(
            f"model.{family.positions}={positions} is shorter than data.seq_len={seq_len}:"
            " raise the one or lower the other"
        )
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            settings_object = family.config_class()(vocab_size=vocab_size, **settings, **ends)
            settings_object._attn_implementation = config.attention
            model = family.model_class()(settings_object)
        except (ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise LayerwiseError(f"model: {name} cannot be built with these settings: {reason}") from None
    assert isinstance(model, nn.Module)
    return model


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Token ids [batch, seq] to logits [batch, seq, vocabulary]."""
    output = model(input_ids=inputs, use_cache=False).logits
    assert isinstance(output, Tensor)
    return output


def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token; `targets` [batch, seq] are the next tokens of `inputs`."""
    predicted = logits(model, inputs)
    return nn.functional.cross_entropy(predicted.flatten(0, 1).float(), targets.flatten())
