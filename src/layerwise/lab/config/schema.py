"""The configuration of a training run: sections, defaults, units and limits.

A config is a YAML file, `key=value` overrides with dotted keys, or nothing at all: the defaults are the
built-in run. Unknown keys are refused with the nearest valid one. Settings that belong to another class (a
transformers config, an optimizer's keywords) stand in the same section and are checked against that class.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from layerwise.lab.config.keys import SHORTHANDS, set_key, validate
from layerwise.lab.runs.recorded import IMAGES


class Section(BaseModel):
    """A section whose keys are exactly those declared; `true` is no number in it, and a word is a list of one."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_it_is_meant(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, str) and field.annotation in (list[str], list[str] | None):
            return [value]
        found = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) for item in found) and _takes(field.annotation, int, float):
            raise PydanticCustomError("number_type", "a number is needed, not true or false")
        return value


def _takes(annotation: Any, *kinds: type) -> bool:
    """Whether a type is one of `kinds`, or holds one."""
    return annotation in kinds or any(_takes(part, *kinds) for part in get_args(annotation))


def one_folder(name: str, key: str) -> str:
    """A name that a folder can have, and that stays where it is put. Raises ValueError."""
    if name in (".", "..") or any(c in name for c in "/\\\0") or not name.isprintable() or len(name.encode()) > 200:
        needed = "a name of one folder is needed, of 200 bytes at most, without slashes and control characters"
        raise ValueError(f"{key}={name!r:.60}: {needed}")
    return name


class OpenSection(Section):
    """A section that also takes the keywords of another class, which are checked against that class."""

    model_config = ConfigDict(extra="allow")

    @property
    def settings(self) -> dict[str, Any]:
        """The keywords that are not declared here."""
        return dict(self.model_extra or {})


def _shorthand(section: str) -> BeforeValidator:
    """Lets `optimizer: lanton` stand for `optimizer: {name: lanton}`."""
    return BeforeValidator(lambda value: {SHORTHANDS[section]: value} if isinstance(value, str) else value)


class LoraConfig(Section):
    """Low-rank adapters by peft: only they are trained."""

    rank: int = Field(default=8, ge=1, le=1_000_000)
    """rank of every adapter"""
    alpha: float = Field(default=8.0, gt=0)
    """adapters are multiplied by alpha / rank"""
    targets: list[str] | None = None
    """module names that get an adapter; null: peft's choice for the model"""
    fixed: Literal["A", "B"] | None = None
    """the factor that is not trained (with B fixed it starts from noise, not at 0)"""


class ModelConfig(OpenSection):
    """What is trained. Further keys are settings of the model (`n_layer: 2`)."""

    preset: str | None = "gpt2-tiny"
    """a preset by name, its settings overridden by the further keys; or null"""
    family: str | None = None
    """a family, of those below: where no preset is named, the further keys are all its settings"""
    start: str | None = None
    """folder of a run of the same model, whose last checkpoint's weights it starts from"""
    lora: LoraConfig | None = None
    """train low-rank adapters instead of the model"""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """attention implementation"""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.preset is None) == (self.family is None):
            raise ValueError("give model.preset, or model.family with model.preset=null")
        return self


class DataConfig(Section):
    """The text, how it becomes token ids, and what is held out; or images, for `resmlp`."""

    source: Literal["builtin", "files", "dataset", "tokens", "digits", "fashion-mnist"] = "builtin"
    """`builtin`: the Python standard library's source; `files`: text files and folders in `paths`; `dataset`: a
    name for the datasets library; `tokens`: one .npy or .bin file of token ids in `paths`; `digits`:
    scikit-learn's images; `fashion-mnist`: Debian's package of them, or the folder of its files in `paths`"""
    paths: list[str] = []
    """files of UTF-8 text and folders (folders: every text file below, in sorted order)"""
    dataset: str | None = None
    """name on the Hugging Face hub, or a local folder"""
    dataset_config: str | None = None
    """configuration of that dataset"""
    dataset_split: str = "train"
    """split of that dataset"""
    text_column: str = "text"
    """its column of text"""
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """type of the ids in a .bin file"""
    tokenizer: Literal["byte", "bpe"] = "bpe"
    """bytes, or byte-level BPE trained on the training text"""
    vocab_size: int | None = Field(default=None, ge=2)
    """number of token ids: bpe, default 2048 (at least 257); a file of ids, default its largest id + 1; bytes
    always have 257 (256 bytes and the end of a document)"""
    seq_len: int = Field(default=128, ge=1)
    """tokens per sequence"""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """fraction held out"""

    @model_validator(mode="after")
    def _read_by_the_source(self) -> Self:
        """Else a run would train on another text than the one that was named."""
        readers = {"paths": ("files", "tokens", "fashion-mnist"), "dataset": ("dataset",), "dataset_config": ("dataset",)}
        for key, sources in readers.items():
            value = getattr(self, key)
            if value and self.source not in sources:
                raise ValueError(
                    f"data.{key}={value} is not read by data.source={self.source}: set"
                    f" data.source={' or '.join(sources)}, or leave data.{key} out"
                )
        if len(self.paths) > 1 and self.source == "fashion-mnist":
            raise ValueError(f"data.paths={self.paths}: data.source=fashion-mnist takes one folder")
        return self

    @property
    def holds_images(self) -> bool:
        """Whether an example is an image and its class, not a row of tokens."""
        return self.source in IMAGES


class OptimizerConfig(OpenSection):
    """The optimizer. Further keys are its keywords (`momentum: 0.9`), checked against its signature."""

    name: str = "adamw"
    """an optimizer by name: `layerwise train --help` lists them"""
    lr: float | None = Field(default=None, ge=0)
    """base learning rate; null: the optimizer's default"""
    weight_decay: float | None = Field(default=None, ge=0)
    """decoupled decay; null: the optimizer's default"""
    rates: Annotated[dict[str, Any] | None, _shorthand("optimizer.rates")] = None
    """layer rates on top: `rule` (dual_norm_adaptive, noise_adaptive, norm_adaptive, static) and its keywords"""
    role_factors: dict[str, PositiveFloat] = {}
    """factor on the rate of every parameter of a role (`{hidden: 0.125}`); the roles are those of
    `layerwise.describe`"""


class ScheduleConfig(Section):
    """The factor on the base learning rate at each step."""

    name: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """`wsd`: warm up, stay, then decay linearly"""
    warmup_steps: int | None = Field(default=None, ge=0)
    """steps of linear warm-up, of any schedule, fewer than the run's; null: 20, or a tenth of the run where
    that is less"""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """rate at the last step, as a fraction of the base rate"""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """wsd: fraction of all steps spent in the decay"""

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps` steps."""
        return min(20, steps // 10) if self.warmup_steps is None else self.warmup_steps

    def factor(self, step: int, steps: int) -> float:
        """On the base rate, at step 0, 1, ..., steps - 1.

        Warm-up rises linearly and reaches 1 after `warmup(steps)` steps; then constant stays at 1, cosine and linear go
        down to `final_fraction`, reached at the last step; wsd stays at 1 and goes down linearly over the last
        `decay_fraction` of all steps.
        """
        warmup, final = self.warmup(steps), self.final_fraction
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.name == "constant":
            return 1.0
        start = max(warmup, round(steps * (1 - self.decay_fraction))) if self.name == "wsd" else warmup
        done = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
        if self.name == "cosine":
            return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
        return final + (1 - final) * (1 - done)


class TrainingConfig(Section):
    """How long, in what batches, and what is written how often. `every` counts optimizer steps; 0: never."""

    steps: int = Field(default=300, ge=1)
    """optimizer steps"""
    batch_size: int = Field(default=16, ge=1)
    """sequences per optimizer step, over all processes and micro-batches"""
    accumulation: int = Field(default=1, ge=1)
    """micro-batches per optimizer step, on every process"""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """largest l2 norm of the whole gradient; null: no clipping"""
    precision: Literal["no", "bf16"] = "no"
    """mixed precision; `no` is float32"""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """seed of the initial weights, the data order and dropout"""
    eval_every: int = Field(default=50, ge=0)
    """steps between evaluations; the last step is always evaluated"""
    eval_batches: int = Field(default=8, ge=1)
    """validation batches of `batch_size` sequences, always the same"""
    log_every: int = Field(default=10, ge=1)
    """steps between lines of metrics.jsonl"""
    record_every: int = Field(default=10, ge=0)
    """steps between lines of layers.jsonl; the last step has one too"""
    checkpoint_every: int = Field(default=100, ge=0)
    """steps between checkpoints; the last step always has one"""
    keep: int = Field(default=2, ge=1)
    """checkpoints kept"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"training.batch_size={self.batch_size} is not a multiple of training.accumulation={self.accumulation}"
            )
        return self


class FunctionSpaceConfig(Section):
    """Measuring what each layer's update does to the outputs, and matching it to a base (FLeRM)."""

    record_every: int = Field(default=0, ge=0)
    """steps between lines of function_space.jsonl, from the first one on; 0: none"""
    space: Literal["output", "log_softmax"] = "output"
    """the outputs: the model's own (logits), or their log-softmax"""
    method: Literal["kronecker", "full_cov", "iid", "exact", "difference"] = "full_cov"
    """estimator of the rates"""
    probes: int = Field(default=64, ge=1, le=1_000_000)
    """random probes, over all batches together"""
    batches: int = Field(default=4, ge=1)
    """batches to measure on: training batches from after the last step"""
    match: str | None = None
    """a base file that `layerwise record` wrote, or `uniform`; null: no matching"""
    match_step: int = Field(default=1, ge=1)
    """step at which rates are matched (adapters: 5 or later, after B has moved)"""
    match_every: int = Field(default=0, ge=0)
    """steps between further matchings; 0: once"""
    depth: dict[str, int | str] | None = None
    """depth map for a base of fewer blocks, `{blocks.*: split}`, with `uniform` the base's number of blocks,
    `{blocks.*: 2}`; null: inferred where it can be"""

    @property
    def measured(self) -> dict[str, Any]:
        """How rates are measured, as the recorder, FLeRM and `lw.check` take it."""
        return {"forward": self.space, "method": self.method, "probes": self.probes}


class ParallelConfig(Section):
    """How several processes, started by torchrun or `accelerate launch`, share a run. One process takes no notice."""

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """`ddp`: every process holds the model; `fsdp2`: a shard of every parameter and of its state"""
    timeout: float = Field(default=1800.0, gt=0)
    """seconds a process waits for the others before it ends with an error: more than tokenising the text, an
    evaluation or writing a checkpoint takes"""


class RunConfig(Section):
    """Where the run is written: the directory `dir/name`."""

    name: Annotated[str, Field(min_length=1), AfterValidator(partial(one_folder, key="run.name"))] | None = None
    """name of the run; null: model and optimizer"""
    dir: str = Field(default="runs", min_length=1)
    """folder of runs"""
    tensorboard: bool = Field(default=True, strict=True)
    """also write TensorBoard events, in the run's `tensorboard` folder"""


class Config(Section):
    """One training run. Every section has defaults; `Config()` is the built-in run."""

    model: Annotated[ModelConfig, _shorthand("model")] = ModelConfig()
    data: Annotated[DataConfig, _shorthand("data")] = DataConfig()
    optimizer: Annotated[OptimizerConfig, _shorthand("optimizer")] = OptimizerConfig()
    schedule: Annotated[ScheduleConfig, _shorthand("schedule")] = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    function_space: FunctionSpaceConfig = FunctionSpaceConfig()
    parallel: Annotated[ParallelConfig, _shorthand("parallel")] = ParallelConfig()
    run: RunConfig = RunConfig()

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one optimizer step; an image counts as one."""
        return self.training.batch_size * (1 if self.data.holds_images else self.data.seq_len)

    @property
    def run_name(self) -> str:
        """`run.name`, or the model's and the optimizer's names."""
        return self.run.name or f"{self.model.preset or self.model.family}-{self.optimizer.name}"

    @property
    def run_path(self) -> Path:
        """The run's directory."""
        return Path(self.run.dir).expanduser() / self.run_name

    def replace(self, changes: dict[str, Any]) -> Self:
        """A copy with dotted keys changed, validated again: `config.replace({"optimizer.lr": 1e-3})`."""
        tree = self.model_dump()
        for key, value in changes.items():
            set_key(tree, key, value)
        return validate(type(self), tree)
