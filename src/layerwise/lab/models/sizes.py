"""One model in several sizes: what a width, a depth, an initial scale or an adapter's rank is in each family's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import ModelConfig
from layerwise.lab.models.families import model_settings

Axis = Literal["width", "depth", "init_scale", "lora_rank"]
AXIS_NAMES: dict[Axis, str] = {
    "width": "width", "depth": "blocks", "init_scale": "initial scale", "lora_rank": "LoRA rank",
}  # fmt: skip


def resized(model: ModelConfig, axis: Axis, value: float) -> dict[str, Any]:
    """Dotted keys of a config and their values, for the model at this size. Raises LayerwiseError.

    width: the hidden size; heads keep their size and grow in number. depth: blocks (in the paper's models with the
    branches rescaled). init_scale: factor on the initial weights. lora_rank: rank of the adapters.
    """
    if axis == "lora_rank":
        if model.lora is None:
            raise LayerwiseError("axis lora_rank needs adapters: give model.lora, such as `{rank: 2}`")
        return {"model.lora.rank": _whole(axis, value)}
    family, settings = model_settings(model)
    try:
        changes = _RESIZE[family, axis](settings, value)
    except KeyError:
        raise LayerwiseError(f"axis {axis} is not known for the family {family}") from None
    return {f"model.{key}": setting for key, setting in changes.items()}


Changes = dict[str, Any]


def _whole(axis: Axis, value: float, of: float = 1) -> int:
    quotient = value / of
    if quotient != int(quotient) or quotient < 1:
        need = "a whole number" if of == 1 else f"a multiple of {of:g}"
        raise LayerwiseError(f"{axis}={value:g}: must be {need}")
    return int(quotient)


def _paper_width(settings: Changes, value: float) -> Changes:
    default = 32
    return {"width": _whole("width", value, settings.get("base_width", default))}


def _paper_depth(default: int) -> Callable[[Changes, float], Changes]:
    return lambda settings, value: {"depth": _whole("depth", value, settings.get("base_blocks", default))}


def _gpt2_width(settings: Changes, value: float) -> Changes:
    head = settings.get("n_embd", 768) // settings.get("n_head", 12)
    return {"n_embd": _whole("width", value), "n_head": _whole("width", value, head)}


def _llama_width(settings: Changes, value: float) -> Changes:
    old, heads = settings.get("hidden_size", 4096), settings.get("num_attention_heads", 32)
    groups = heads // (settings.get("num_key_value_heads") or heads)
    new_heads = _whole("width", value, old // heads)
    return {
        "hidden_size": _whole("width", value),
        "num_attention_heads": new_heads,
        "num_key_value_heads": max(1, new_heads // groups),
        "intermediate_size": round(settings.get("intermediate_size", 11008) * value / old),
    }


def _blocks(key: str) -> Callable[[Changes, float], Changes]:
    return lambda settings, value: {key: _whole("depth", value)}


def _initializer_range(settings: Changes, value: float) -> Changes:
    return {"initializer_range": settings.get("initializer_range", 0.02) * value}


_RESIZE: dict[tuple[str, str], Callable[[Changes, float], Changes]] = {
    ("resmlp", "width"): _paper_width,
    ("resmlp", "depth"): _paper_depth(4),
    ("resmlp", "init_scale"): lambda settings, value: {"init_scale": value},
    ("decoder", "width"): _paper_width,
    ("decoder", "depth"): _paper_depth(2),
    ("decoder", "init_scale"): lambda settings, value: {"init_scale": value},
    ("gpt2", "width"): _gpt2_width,
    ("gpt2", "depth"): _blocks("n_layer"),
    ("gpt2", "init_scale"): _initializer_range,
    ("llama", "width"): _llama_width,
    ("llama", "depth"): _blocks("num_hidden_layers"),
    ("llama", "init_scale"): _initializer_range,
}
