"""Small batches for transformers' models, from their config."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerwise.common.tensors import is_sharded

_TOKENS = 8


def made_batch(model: Any) -> dict[str, Any] | None:
    """A small batch for a model of transformers, None for all others and where running it is not safe.

    Not safe is a model with hooks (of accelerate, FSDP2, or the user's own) or with sharded parameters: running it may
    move weights or wait for other processes.
    """
    hooked = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    kinds = [(kind.__name__, kind.__module__.partition(".")[0]) for kind in type(model).__mro__]
    if ("PreTrainedModel", "transformers") not in kinds or hooked or any(is_sharded(p) for p in model.parameters()):
        return None
    names = inspect.signature(model.forward).parameters
    wanted = [model.main_input_name, *_WITH_THEM.get(model.main_input_name, ())]
    if model.config.is_encoder_decoder:
        wanted.append("decoder_input_ids")
    if "image_token" in " ".join(vars(model.config)):  # images go where the text says; text alone will do
        wanted = [name for name in wanted if name != "pixel_values"]
    wanted += [name for name, p in names.items() if p.default is p.empty and name in _MAKERS]
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None or model.main_input_name not in _MAKERS:
        return None
    device = torch.device("cpu") if weight.is_meta else weight.device
    made = {name: _MAKERS[name](model.config) for name in dict.fromkeys(wanted) if name in names}
    return {name: x.to(device, weight.dtype) if x.is_floating_point() else x.to(device) for name, x in made.items()}


def _tokens(config: Any) -> Tensor:
    """Eight tokens, the last of which ends the text, for models that read their answer off there."""
    text = config.get_text_config()
    entries = getattr(text, "vocab_size", None) or 64  # CANINE hashes its characters and has no vocabulary
    ids = (torch.arange(_TOKENS)[None] + 3) % entries
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < entries:
        ids[:, -1] = end
    return ids


def _anywhere(config: Any, name: str, default: Any) -> Any:
    """A number from the config or one of the configs in it."""
    inside = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    values = [getattr(each, name, None) for each in (config, *inside)]
    return next((value for value in values if value is not None), default)


def _pixels(config: Any) -> Tensor:
    size = _anywhere(config, "image_size", 64)
    height, width = (size, size) if isinstance(size, int) else list(size)[-2:]
    return torch.zeros(1, _anywhere(config, "num_channels", 3), height, width)


def _spectrogram(config: Any) -> Tensor:
    bins = _anywhere(config, "num_mel_bins", 80)
    return torch.zeros(1, bins, 2 * _anywhere(config, "max_source_positions", 64))


_MAKERS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "pixel_values": _pixels,
    "input_values": lambda config: torch.zeros(1, 4000),
    "input_features": _spectrogram,
    "bbox": lambda config: torch.zeros(1, _TOKENS, 4, dtype=torch.int64),
}
_WITH_THEM = {"input_ids": ("pixel_values", "bbox"), "pixel_values": ("input_ids",)}
