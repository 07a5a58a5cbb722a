"""Writes docs/configuration.md from the config classes: `python docs/make_configuration.py`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from layerwise.lab.config.schema import LoraConfig
from layerwise.lab.experiments.contenders import CompareSection
from layerwise.lab.experiments.sweep.run_sweep import SweepConfig
from layerwise.lab.models.families import FAMILIES, PRESETS
from layerwise.lab.optimizers.registry import RULES, Preset, base_rates, optimizers

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = """# Configuration

This page is made from the code: `python docs/make_configuration.py`.

    layerwise train [CONFIG] [KEY=VALUE]... [--resume [--or-start] | --overwrite]

`CONFIG` is a YAML file with the sections below, or the folder of an earlier run, whose config is then taken.
Without it every key has its default: a small GPT-2 trained on the source of the Python standard library.
Overrides are dotted keys with YAML values, applied in order after the file:

    layerwise train my.yaml optimizer.lr=1e-3 model.n_layer=2 training.precision=bf16

A section written as one word sets its first key: `optimizer=lanton` is `optimizer.name=lanton`, `model=llama-tiny`
is `model.preset=llama-tiny`, `data=files` is `data.source=files`, `schedule=wsd` is `schedule.name=wsd`, `parallel=fsdp2`
is `parallel.strategy=fsdp2`. A mapping for a section sets the keys that it names: `optimizer={lr: 1e-3}` is
`optimizer.lr=1e-3`. Unknown keys are errors that name the nearest valid one.

`--resume` goes on from the newest good checkpoint and ends with the numbers of a run that was never interrupted, bit
for bit (on the same machine, with the same thread count and package versions). Only the sections `run` and `parallel`,
`training.keep`, `training.checkpoint_every` and `data.paths` may differ from the interrupted run's. A damaged checkpoint
is reported and passed over for the one before it. Where there is no checkpoint, `--resume` is an error; with `--or-start` it
then starts at step 0, for scripts that are run again and again. `compare` starts such runs again by itself.

A folder that is not empty and no run of ours is left as it is; `--overwrite` says what it would delete there.

Tokenised text is cached in `~/.cache/layerwise`, or where the environment variable `LAYERWISE_CACHE` says. With
`LAYERWISE_MOST_STEPS=3` in the environment no run takes more than 3 steps: to see whether a command works.
"""


def _class(preset: Preset) -> str:
    """Where a program imports the class of an optimizer from."""
    module, name = preset.build.__module__, preset.build.__name__
    public = next((p for p in ("torch.optim", "layerwise.optim") if module.startswith(p + ".")), module)
    return f"{public.replace('layerwise.optim', 'layerwise')}.{name}"


def _rates(optimizer: str) -> str:
    """The default rate of an optimizer: its signature's, and beside it those of the data file."""
    found = {model: entry["rates"].get(optimizer) for model, entry in base_rates().items()}
    others = "".join(f", `{model}` {rate:g}" for model, rate in found.items() if rate is not None)
    return f"{optimizers()[optimizer].default('lr'):g}{others}"


AFTER = {
    "model": "Presets:\n\n| preset | family | settings |\n|---|---|---|\n"
    + "\n".join(
        f"| `{name}` | {family} | {', '.join(f'`{k}={v}`' for k, v in settings.items())} |"
        for name, (family, settings) in PRESETS.items()
    )
    + "\n\nThe vocabulary is the tokenizer's, and the longest sequence `data.seq_len`, unless set. Further keys, as"
    " transformers names them:\n\n"
    + "\n".join(
        f"- `{name}`: {', '.join(f'`{key}`' for key in sorted(family.setting_defaults()))}"
        for name, family in FAMILIES.items()
    )
    + "\n\n`model.lora`, such as `model.lora.rank=4`. {lora}",
    "data": "The built-in text is every `.py` file of the standard library in sorted order, without tests, `encodings`,"
    " `idlelib`, `tkinter`, `lib2to3`, `turtledemo` and generated files; its hash goes into the record of the run. Every"
    " n-th document is held out, n = 1 / `validation_fraction`; where there are fewer than 2 n documents, the end of the"
    " text is. A BPE is trained on the training part only.\n\nBatches are a function of `training.seed` and the step"
    " alone: runs that differ in the optimizer see the same sequences. Each pass over the text cuts it into sequences at"
    " a new random phase and shuffles them.",
    "optimizer": "| name | class | default `lr` | default `weight_decay` | layer rates | further keys |\n"
    "|---|---|---|---|---|---|\n"
    + "\n".join(
        f"| `{name}` | `{_class(preset)}`"
        f" | {_rates(name)} | {preset.decay:g}"
        f" | {preset.rule or ('none, unless `rates` is given' if preset.takes_rates else 'none')}"
        f" | {', '.join(f'`{key}`' for key in sorted(preset.keywords()))} |"
        for name, preset in optimizers().items()
    )
    + "\n\nThe default `lr` is that of the optimizer's signature; for the model presets named beside it, the other one."
    + "\n\nThe rules of `optimizer.rates`, whose keys are their arguments:\n\n"
    + "\n".join(
        f"- `{name}`: `{rule.__name__}`, keys {', '.join(f'`{key}`' for key in inspect.signature(rule).parameters)}"
        for name, rule in RULES.items()
    )
    + "\n\n`multipliers` of `static` is a mapping from unit names, or the folder of a run whose mean multipliers are"
    " taken. `reference: independent` of `noise_adaptive` needs an even `training.accumulation`, `reference: replicas`"
    " several processes with equal shares of a micro-batch.",
    "parallel": "`torchrun --nproc-per-node 2 -m layerwise train CONFIG parallel=fsdp2`; what several processes change, and"
    " what not, is in [distributed](distributed.md#the-lab).",
    "sweep": "For `layerwise sweep` alone, which varies the run that the other sections describe"
    " ([sweeps](sweeps.md#sweep)):\n\n"
    "    sweep: {axis: width, sizes: [64, 256], lr: {low: 1e-4, high: 1e-1, count: 10}, methods: [standard, flerm]}\n\n"
    "`layerwise sweep CONFIG --dry-run` says how many trials that is.",
    "compare": "For `layerwise compare` alone, in which each contender takes the place of the optimizer. Equal budgets, with"
    " a contender tuned by role, and what a difference is worth in tokens:\n\n"
    "    compare:\n"
    "      optimizers: [dual-muon, d-muon, adamw]\n"
    "      seeds: 3\n"
    "      lr_grid: auto\n"
    "      by_role: [d-muon]                                # shown once with one rate and once tuned by role\n"
    "      roles: {embedding: [2, 4], head: [2, 4], vector: [0.5, 2]}\n"
    "      trials: 12                                       # of each contender, all seeds each\n"
    "      baseline: d-muon\n"
    "      lengths: [0.85, 1.15, 1.3]                       # the baseline's own runs of other lengths\n\n"
    "Tuning goes coordinate by coordinate: base rates, each role's factors at the best so far, the base rate again; what is"
    " left of `trials` goes into finer base rates. The report has, for each contender at its best, the difference to the"
    " baseline with a paired 95 % interval over seeds, the tokens that the baseline needs for the same loss, and the octaves"
    " of base rate within 0.05 of the best.",
}


def _type(annotation: Any) -> str:
    """A type in the words of the page; limits on elements (`Annotated`) are left to the error message."""
    if annotation is None or annotation is NoneType:
        return "null"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(repr(value) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(map(_type, arguments))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    name = str(getattr(annotation, "__name__", annotation))
    return f"{name}[{', '.join(map(_type, arguments))}]" if arguments else name


def _limits(field: FieldInfo) -> str:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return ", ".join(
        f"{signs[name]} {value}"
        for limit in field.metadata
        for name in signs
        if (value := getattr(limit, name, None)) is not None
    )


def _row(section: str, key: str, field: FieldInfo) -> str:
    limits = _limits(field)
    kind = _type(field.annotation) + (f", {limits}" if limits else "")
    default = json.dumps(field.get_default(call_default_factory=True))
    meaning = " ".join((field.description or "").split())
    return f"| `{section}.{key}` | {kind} | `{default}` | {meaning} |"


def _table(name: str, section: type[BaseModel]) -> str:
    rows = "\n".join(_row(name, key, field) for key, field in section.model_fields.items())
    return f"{section.__doc__}\n\n| key | type | default | meaning |\n|---|---|---|---|\n{rows}\n"


def page() -> str:
    """The text of the page."""
    parts = [INTRODUCTION]
    sections = {name: field.annotation for name, field in SweepConfig.model_fields.items()}
    for name, section in {**sections, "compare": CompareSection}.items():
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        after = f"\n{AFTER[name]}\n" if name in AFTER else ""
        after = after.replace("{lora}", _table("model.lora", LoraConfig).rstrip())
        parts.append(f"## {name}\n\n{_table(name, section)}{after}")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
