"""transformers' Trainer: an optimizer made from the model, layer rates in the logs, function-space rates and FLeRM.

    trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=trainer_optimizer(lw.Lanton, lr=2e-3))
    log_layer_rates(trainer)
    trainer.train()

The Trainer's accumulation, clipping (of gradients, before the step), mixed precision, schedule and resuming work as
with any optimizer. ``TrainingArguments(learning_rate, weight_decay)`` are not used: give ``lr`` and ``weight_decay`` here.
``lw.layer_rates(trainer.optimizer)`` gives the rates of the optimizer that the Trainer has wrapped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layerwise.common.checked import PositiveInt, checked
from layerwise.errors import warn
from layerwise.function_space import FLeRM, FunctionSpaceRecorder, Watch, WatchRecord
from layerwise.function_space import watch as watch_optimizer
from layerwise.function_space.measuring.process_group import processes_of
from layerwise.function_space.measuring.slices import share
from layerwise.function_space.steps.watched_step import is_supplier
from layerwise.geometry import param_groups, torch_groups
from layerwise.geometry.groups import Factors
from layerwise.integrations.logged import Level, RateLog
from layerwise.optim import Lanton, LayerwiseOptimizer
from layerwise.optim.optimizer import layerwise_optimizer

Observer = FunctionSpaceRecorder | FLeRM


def trainer_optimizer(
    preset: type[Optimizer] = Lanton,
    *,
    batch: Any = None,
    overrides: Mapping[str, Any] | None = None,
    splits: Mapping[str, Any] | None = None,
    factors: Factors = None,
    **options: Any,
) -> tuple[Callable[[], Callable[..., Optimizer]], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes.

    A trainer without that argument (TRL's for DPO and GRPO) takes it as its attribute, before ``train()``.

    Args:
        preset: ``lw.Lanton``, ``lw.Muon``, ...; or another optimizer, as ``torch.optim.AdamW``, which then needs ``lr``.
        batch, overrides, splits, factors: as for ``lw.param_groups``; ``factors=lw.layer_decay(model, 0.75)``, for example.
            The batch where the model is.
        options: of the preset.
    """

    def build(
        model: nn.Module, overrides: Any = overrides, splits: Any = splits, factors: Factors = factors, **options: Any
    ) -> Optimizer:
        groups = param_groups(model, batch, overrides, splits, factors=factors)
        rate: Any = options.get("lr")
        plain = isinstance(preset, type) and not issubclass(preset, LayerwiseOptimizer)  # a partial of ours is no type
        optimizer = preset(torch_groups(groups, rate) if plain else groups, **options)
        _warn_of_unused(optimizer)
        return optimizer

    build.__name__ = "trainer_optimizer"  # as errors call it
    return lambda: checked(build), options  # the Trainer calls the first for a factory, and that with its model


def _warn_of_unused(optimizer: Optimizer) -> None:
    """Tell of arguments that were set and that say something else than the optimizer that is made now.

    The Trainer hands a factory its model alone: its arguments are found among the callers.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    if frame is None:
        return
    arguments = frame.f_locals["self"].args
    usual = {field.name: field.default for field in fields(arguments)}
    for name, option in (("learning_rate", "lr"), ("weight_decay", "weight_decay")):
        given, own = getattr(arguments, name), optimizer.defaults[option]
        if given not in (usual[name], own):
            warn(
                f"TrainingArguments({name}={given:g}) has no effect: the optimizer's own {option} is {own:g}; give it to "
                f"trainer_optimizer({type(optimizer).__name__}, {option}=...)"
            )


@checked
class LayerRatesCallback(TrainerCallback):  # type: ignore[misc]
    """Logs layer rates at each of the trainer's logging steps, to all that it reports to; see ``log_layer_rates``."""

    def __init__(self, trainer: Trainer, log: RateLog) -> None:
        self.trainer = trainer
        self.log = log
        self._rates: dict[str, float] = {}

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        layerwise_optimizer(optimizer)  # fails at once where there are no layer rates

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, optimizer: Any, **__: Any) -> None:
        # Read here, as the schedule moves on before the step is logged; and only if it will be, as reading waits.
        step = state.global_step + 1
        if step % state.logging_steps == 0 or (step == 1 and args.logging_first_step):
            self._rates = self.log(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_log and self._rates:
            self.trainer.log(self._rates)
            control.should_log = True  # logging has cleared it, and the Trainer's own entry is still to come
            self._rates = {}


def log_layer_rates(trainer: Trainer, by: Level = "role and block", only: str | Sequence[str] = "*") -> None:
    """Have ``trainer`` log ``layer_lr/NAME`` and ``layer_squared_norm/NAME``: at most 512 names a step.

    Args:
        trainer: whose run.
        by: ``"role and block"`` (means over the units of one role in one block), ``"role"``, ``"block"`` or ``"unit"``.
        only: glob patterns of parameters; the others are left out.
    """
    trainer.add_callback(LayerRatesCallback(trainer, RateLog(by, only)))


@checked
class WatchCallback(TrainerCallback):  # type: ignore[misc]
    """`lw.watch` of a Trainer's run: logs its numbers to all that the Trainer reports to, and goes on after a resume.

    Args:
        trainer: whose run.
        every: how many optimizer steps apart; None: the Trainer's own `logging_steps`.
        options: of `lw.watch`.

    Attributes:
        watch: of the training under way, or the last one.
    """

    FILE = "watch.json"

    def __init__(self, trainer: Trainer, every: PositiveInt | None = None, **options: Any) -> None:
        self.trainer = trainer
        self.every = every
        self.options = options
        self.watch: Watch | None = None
        self._numbers: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **given: Any) -> None:
        if self.watch is not None:  # of an earlier `train()`
            self.watch.detach()
        every = int(state.logging_steps) if self.every is None else self.every
        options = {**self.options, "to": [self._take, self.options.get("to")]}
        self.watch = watch_optimizer(given["model"], given["optimizer"], every, **options)
        saved = _beside_checkpoint(args, state, self.FILE)
        if state.global_step and saved.exists():
            self.watch.load_state_dict(json.loads(saved.read_text()))
        elif state.global_step:
            self.watch.load_state_dict({**self.watch.state_dict(), "steps": state.global_step})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._numbers:
            logs = control.should_log
            self.trainer.log(self._numbers)
            control.should_log = logs  # logging has cleared it; the Trainer's own entry may still come
            self._numbers = {}

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        assert self.watch is not None
        if args.should_save:  # on the first process
            _beside_checkpoint(args, state, self.FILE).write_text(json.dumps(self.watch.state_dict()))

    def _take(self, record: WatchRecord) -> None:
        self._numbers = record.scalars()


def watch(trainer: Trainer, every: PositiveInt | None = None, **options: Any) -> WatchCallback:
    """Have ``trainer`` watch its optimizer, any of them, and log what each module's steps are; see ``lw.watch``.

    watched = watch(trainer, every=10)
    trainer.train()
    print(watched.watch.records[-1])
    """
    callback = WatchCallback(trainer, every, **options)
    trainer.add_callback(callback)
    return callback


class ReplicasCallback(TrainerCallback):  # type: ignore[misc]
    """Shows the optimizer each process's own gradients, for ``NoiseAdaptive(reference="replicas")`` under DDP or FSDP2."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        layerwise_optimizer(optimizer).watch_replicas(self.trainer.model_wrapped)


def watch_replicas(trainer: Trainer) -> None:
    """Have ``trainer`` show its optimizer each process's own gradients; see ``LayerwiseOptimizer.watch_replicas``."""
    trainer.add_callback(ReplicasCallback(trainer))


@checked
class FunctionSpaceCallback(TrainerCallback):  # type: ignore[misc]
    """Function-space rates (or FLeRM) around the Trainer's optimizer steps; they go on after a resume.

        Trainer(..., callbacks=[FunctionSpaceCallback(partial(FunctionSpaceRecorder, every=100), batch)])

    Args:
        make: called with the model and the optimizer when training begins; makes a recorder or a FLeRM.
        batch: what to measure on, as in ``FunctionSpaceRecorder.step``: inputs, or a function that returns them. Over
            several processes inputs are the global batch, the same everywhere, of which each takes its part; a function
            returns the process's part.

    ``observer`` is what ``make`` made. Over several processes all of them measure, DDP or FSDP2, and have the same rates.
    """

    FILE = "function_space.pt"

    def __init__(self, make: Callable[[nn.Module, Any], Observer], batch: Any) -> None:
        self.make = make
        self.batch = batch
        self.observer: Observer | None = None
        self._step: AbstractContextManager[None] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **given: Any) -> None:
        if isinstance(self.observer, FLeRM):  # of an earlier `train()`
            self.observer.detach()
        self.observer = self.make(given["model"], given["optimizer"])
        saved = _beside_checkpoint(args, state, self.FILE)
        if not state.global_step:
            return
        if saved.exists():
            self.observer.load_state_dict(torch.load(saved, weights_only=True))
        else:
            warn(
                f"resumed at step {state.global_step}, and {saved} is not there: FunctionSpaceCallback starts afresh, "
                "counting steps from 0 (resume in the output_dir of the run, or copy the file)"
            )

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        assert self.observer is not None
        processes = processes_of(self.observer.measurement.processes)
        batch = self.batch if is_supplier(self.batch) else share(self.batch, processes)
        self._step = self.observer.step(batch)
        self._step.__enter__()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        assert self._step is not None
        self._step.__exit__(None, None, None)
        self._step = None

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        assert self.observer is not None
        if args.should_save:  # on the first process
            torch.save(self.observer.state_dict(), _beside_checkpoint(args, state, self.FILE))


def _beside_checkpoint(args: TrainingArguments, state: TrainerState, name: str) -> Path:
    """A file of ours in the folder of the Trainer's checkpoint of this step."""
    return Path(args.output_dir, f"checkpoint-{state.global_step}", name)
