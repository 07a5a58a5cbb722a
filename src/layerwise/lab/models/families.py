"""Models by preset or family name, built without a network: randomly initialised, or from the weights of an earlier run;
with low-rank adapters (LoRA, by peft) where a config asks for them.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import layerwise.lab.models
from layerwise.common.checked import fits, wanted
from layerwise.common.discover import import_files
from layerwise.errors import LayerwiseError
from layerwise.lab.config.keys import nearest
from layerwise.lab.config.schema import LoraConfig, ModelConfig
from layerwise.lab.models.family import AXIS_NAMES, FAMILIES, Examples, whole
from layerwise.lab.runs.checkpoint import list_checkpoints, load_checkpoint

import_files(layerwise.lab.models)  # each file registers its families

LARGEST_SIZE, MOST_BLOCKS = 1_000_000, 10_000

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    preset: (name, settings) for name, family in FAMILIES.items() for preset, settings in family.presets.items()
}


def model_settings(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The family and its settings: the preset's with the config's on top. Raises LayerwiseError."""
    if config.preset is not None and config.preset not in PRESETS:
        raise LayerwiseError(f"model.preset={config.preset!r}: {nearest(config.preset, PRESETS)}")
    family, settings = PRESETS[config.preset] if config.preset else (str(config.family), {})
    if family not in FAMILIES:
        raise LayerwiseError(f"model.family={family!r}: {nearest(family, FAMILIES)}")
    defaults = FAMILIES[family].setting_defaults()
    for key, value in config.settings.items():
        if key not in defaults:
            raise LayerwiseError(
                f"unknown key `model.{key}`: {nearest(key, defaults.keys() | set(type(config).model_fields))}"
            )
        _check_setting(f"model.{key}", value, defaults[key])
    settings = {**settings, **config.settings}
    counts = [settings.get(key, 1) for key in FAMILIES[family].layers]
    blocks = math.prod(count for count in counts if isinstance(count, int))
    if blocks > MOST_BLOCKS:
        raise LayerwiseError(f"model: {blocks:,} blocks: at most {MOST_BLOCKS:,} can be built")
    return family, settings


def _check_setting(key: str, value: Any, default: Any) -> None:
    """Raises LayerwiseError for what no model has: transformers makes one without blocks of `n_layer=-1`."""
    kind = type(default)
    if kind in (bool, int, float) and not fits(value, kind):
        raise LayerwiseError(f"{key}={value!r}: give {wanted(kind)}")
    if kind is not bool and isinstance(value, bool):
        raise LayerwiseError(f"{key}={value!r}: give a number or word, not true or false")
    counts = isinstance(value, int) and not isinstance(value, bool) and isinstance(default, int | None)
    if counts and not 1 <= value <= LARGEST_SIZE:
        raise LayerwiseError(f"{key}={value}: a whole number from 1 to {LARGEST_SIZE:,} is needed")


def build_model(config: ModelConfig, examples: Examples, seed: int) -> nn.Module:
    """A model in float32 on the CPU, initialised from `seed` alone; the global random state stays as it was.

    Raises LayerwiseError.
    """
    name, settings = model_settings(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = FAMILIES[name].build(settings, examples, config.attention)
            if config.start is not None:
                load_weights(model, config.start)
            if config.lora is not None:
                model = add_adapters(model, config.lora)
            if torch.get_default_device().type != "meta":
                _check_forward(model, examples)
        except LayerwiseError:
            raise
        except (ValueError, TypeError, LookupError, ZeroDivisionError, RuntimeError) as error:
            reason = f"it knows no {error}" if isinstance(error, KeyError) else error
            given = config.settings | ({} if config.lora is None else {"lora.rank": config.lora.rank})
            shown = "".join(f" {key}={value!r}" for key, value in given.items())
            what = f"{name} cannot be built with{shown or ' its defaults'}"
            raise LayerwiseError(f"model: {what}: {reason}") from None
        return model


def load_weights(model: nn.Module, run: str) -> None:
    """Loads the weights of a run's newest checkpoint. Raises LayerwiseError."""
    checkpoints = list_checkpoints(Path(run).expanduser() / "checkpoints")
    if not checkpoints:
        raise LayerwiseError(f"model.start={run}: no checkpoint there; name the folder of a run that has one")
    try:
        model.load_state_dict(load_checkpoint(checkpoints[0])["model"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise LayerwiseError(f"model.start={run} is a run of another model: {error!s:.300}") from None


def add_adapters(model: nn.Module, config: LoraConfig) -> nn.Module:
    """The model with adapters, everything else frozen; A from a normal distribution, B at 0 unless it is fixed.

    Raises LayerwiseError.
    """
    import peft

    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=config.targets, init_lora_weights="gaussian"
    )
    try:
        with warnings.catch_warnings():
            # peft sees by itself that GPT-2's weights are (in, out), and calls an old name.
            warnings.filterwarnings("ignore", "fan_in_fan_out|`is_gradient_checkpointing`")
            adapted = peft.get_peft_model(model, settings)
    except (ValueError, AttributeError, KeyError) as error:
        raise LayerwiseError(
            f"model.lora.targets={config.targets}: {error!s:.200}; name modules of the model, such as [query, value]"
        ) from None
    for name, parameter in adapted.named_parameters():
        if config.fixed is not None and f"lora_{config.fixed}" in name:
            parameter.requires_grad_(False)
            if config.fixed == "B":  # at 0 it would keep A from learning
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return adapted


@torch.no_grad()
def _check_forward(model: nn.Module, examples: Examples) -> None:
    """Heads that do not fit one another are found by the first forward pass: here, before anything is replaced."""
    shape = (min(2, examples.seq_len),) if examples.features is None else (examples.features,)
    logits(model, torch.zeros(1, *shape, dtype=torch.long if examples.features is None else torch.float32))


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Token ids [batch, seq] or features [batch, features] to logits [..., vocabulary]."""
    output = model(inputs)
    return output if isinstance(output, Tensor) else output.logits


def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats; `targets` are the next tokens of `inputs` [batch, seq], or classes [batch]."""
    predicted = logits(model, inputs)
    return nn.functional.cross_entropy(predicted.flatten(0, -2).float(), targets.flatten())


def resized(model: ModelConfig, axis: str, value: float) -> dict[str, Any]:
    """Dotted keys of a config and their values, for the model at this size. Raises LayerwiseError.

    Args:
        model: at another size.
        axis: width: the hidden size; heads keep their size and grow in number. depth: blocks (in the paper's models with
            the branches rescaled). init_scale: factor on the initial weights. lora_rank: rank of the adapters.
        value: the size.
    """
    known = next((name for name in AXIS_NAMES if name == axis), None)
    if known is None:
        raise LayerwiseError(f"axis {axis!r} of a config: {nearest(axis, AXIS_NAMES)}")
    if known == "lora_rank":
        if model.lora is None:
            raise LayerwiseError("axis lora_rank needs adapters: give model.lora, such as `{rank: 2}`")
        return {"model.lora.rank": whole(known, value)}
    name, settings = model_settings(model)
    family = FAMILIES[name]
    changed = family.resize({**family.setting_defaults(), **settings}, known, value)
    return {f"model.{key}": setting for key, setting in changed.items()}


def block_pattern(model: ModelConfig) -> str:
    """What the model's blocks are called, inside peft's wrapper too."""
    name, _ = model_settings(model)
    return FAMILIES[name].blocks if model.lora is None else f"base_model.model.{FAMILIES[name].blocks}"
