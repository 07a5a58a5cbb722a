"""Models by preset name, randomly initialised, built without a network.

transformers' GPT-2 and Llama, and the two models of the function-space paper.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from layerwise.errors import LayerwiseError
from layerwise.lab.config.validate import nearest
from layerwise.lab.models.adapters import add_adapters, load_weights
from layerwise.lab.models.paper import Decoder, ResMLP

if TYPE_CHECKING:
    from layerwise.lab.config.schema import ModelConfig


@dataclass(frozen=True)
class Examples:
    """What the data gives a model: token ids of `vocab_size` kinds, or rows of `features` in `vocab_size` classes."""

    vocab_size: int
    seq_len: int
    features: int | None = None


class Family(Protocol):
    """A kind of model."""

    def setting_names(self) -> set[str]:
        """Keywords of the architecture that a config may set."""
        ...

    def build(self, settings: dict[str, Any], examples: Examples, attention: str) -> nn.Module:
        """A model from the global random state. Raises LayerwiseError."""
        ...


@dataclass(frozen=True)
class TransformersFamily:
    """A decoder of transformers: its classes, and what it calls its longest sequence."""

    config_class: Callable[[], Any]
    model_class: Callable[[], Any]
    positions: str

    def setting_names(self) -> set[str]:
        parameters = inspect.signature(self.config_class()).parameters.values()
        own = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        return own - {"vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}

    def build(self, settings: dict[str, Any], examples: Examples, attention: str) -> nn.Module:
        """Its longest sequence is the data's unless the settings have one."""
        if examples.features is not None:
            raise LayerwiseError("this model reads token ids, data.source gives images: use model=resmlp")
        positions = settings.setdefault(self.positions, examples.seq_len)
        if isinstance(positions, int) and positions < examples.seq_len:
            raise LayerwiseError(
                f"model.{self.positions}={positions} is shorter than data.seq_len={examples.seq_len}:"
                " raise the one or lower the other"
            )
        from huggingface_hub.errors import StrictDataclassError  # how transformers refuses a setting's type

        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
        try:
            made = self.config_class()(vocab_size=examples.vocab_size, **settings, **ends)
        except StrictDataclassError as error:
            raise TypeError(str(error)) from None
        made._attn_implementation = attention
        model = self.model_class()(made)
        assert isinstance(model, nn.Module)
        return model


@dataclass(frozen=True)
class PaperFamily:
    """A model of the function-space paper: its keywords are its settings."""

    model_class: type[ResMLP] | type[Decoder]

    def setting_names(self) -> set[str]:
        parameters = inspect.signature(self.model_class).parameters.values()
        return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY} - {"attention"}

    def build(self, settings: dict[str, Any], examples: Examples, attention: str) -> nn.Module:
        if self.model_class is ResMLP:
            if examples.features is None:
                raise LayerwiseError("model=resmlp reads images: set data.source to digits or fashion-mnist")
            return ResMLP(examples.features, examples.vocab_size, **settings)
        if examples.features is not None:
            raise LayerwiseError("model=decoder reads token ids, data.source gives images: use model=resmlp")
        return Decoder(examples.vocab_size, attention=attention, **settings)


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


FAMILIES: dict[str, Family] = {
    "gpt2": TransformersFamily(_gpt2_config, _gpt2_model, "n_positions"),
    "llama": TransformersFamily(_llama_config, _llama_model, "max_position_embeddings"),
    "resmlp": PaperFamily(ResMLP),
    "decoder": PaperFamily(Decoder),
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
    "resmlp": ("resmlp", {}),
    "decoder": ("decoder", {}),
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


def build_model(config: ModelConfig, examples: Examples, seed: int) -> nn.Module:
    """A model in float32 on the CPU, initialised from `seed` alone; the global random state stays as it was.

    Raises LayerwiseError.
    """
    name, settings = model_settings(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = FAMILIES[name].build(settings, examples, config.attention)
        except LayerwiseError:
            raise
        except (ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise LayerwiseError(f"model: {name} cannot be built with these settings: {reason}") from None
        if config.start is not None:
            load_weights(model, config.start)
        return model if config.lora is None else add_adapters(model, config.lora)


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Token ids [batch, seq] or features [batch, features] to logits [..., vocabulary]."""
    output = model(inputs)
    values = output if isinstance(output, Tensor) else output.logits
    assert isinstance(values, Tensor)
    return values


def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats; `targets` are the next tokens of `inputs` [batch, seq], or classes [batch]."""
    predicted = logits(model, inputs)
    return nn.functional.cross_entropy(predicted.flatten(0, -2).float(), targets.flatten())
