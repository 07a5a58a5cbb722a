"""The training loop."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from layerwise.common.layer_rate import LayerRate, parameter_of
from layerwise.errors import LayerwiseError, NonFiniteError
from layerwise.function_space.watching.watch_record import unit_rates
from layerwise.lab.config.schema import Config
from layerwise.lab.data.batches import open_data
from layerwise.lab.models.families import build_model, loss
from layerwise.lab.models.family import Examples
from layerwise.lab.optimizers.registry import build_optimizer, check_batch, rules_of
from layerwise.lab.runs.checkpoint import random_state, save_checkpoint, set_random_state
from layerwise.lab.runs.directory import RunWriter, machine, parameter_table, versions
from layerwise.lab.training import parallel, processes
from layerwise.lab.training.observers import Observer, QuietProgress


class DivergedError(Exception):
    """The loss or a gradient is not finite: the end of a run, not a fault of the program."""


@contextmanager
def between_steps() -> Iterator[Callable[[], None]]:
    """Inside, the first Ctrl-C waits until what is given here is called: a run is stopped when its state and its records
    are whole, and not inside a library's lock. A second one ends it at once.

    A program that ignores Ctrl-C, as in the background, goes on doing so.
    """
    asked = False

    def may_stop() -> None:
        if asked:
            raise KeyboardInterrupt

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        may_stop()
        asked = True

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():  # which alone is sent it
        yield may_stop
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield may_stop
    finally:
        signal.signal(signal.SIGINT, before)


class Trainer:
    """One run in progress, or this process's part of it.

    Attributes:
        config: complete.
        model: not wrapped; its parameters are DTensors under FSDP2.
        optimizer: as the loop steps it.
        data: `batch(step)` is the whole batch of a step, counted from 0.
        device: of this process.
        rank, world: of several processes, this one's number and how many there are.
        writer: its `append("function_space", row)` adds a record.
        step: optimizer steps taken.
    """

    def __init__(
        self, config: Config, writer: RunWriter, progress: QuietProgress, observers: Sequence[Observer] = ()
    ) -> None:
        self.config, self.writer, self.progress, self.observers = config, writer, progress, observers
        training = config.training
        self.device = processes.own_device()
        processes.check_precision(training, self.device)
        self.rank, self.world = processes.rank(), processes.world()
        # The first process fills the cache of token ids, the others read it.
        self.data = processes.on_first(lambda: open_data(config)) or open_data(config)
        examples = Examples(self.data.vocab_size, config.data.seq_len, self.data.features)
        model = build_model(config.model, examples, training.seed)
        self.model = parallel.place(model, self.device, config.parallel)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.scheduler = LambdaLR(self.optimizer, self._schedule)
        check_batch(training, self.optimizer, self.world)
        processes.autocast(self.model, training.precision, self.device)
        self._wrapped = parallel.wrap(self.model, self.device, config.parallel)
        rules = rules_of(self.optimizer)
        self._halves = any(rule.needs_halves for rule in rules)
        if any(rule.needs_replicas for rule in rules):
            self.optimizer.watch_replicas(self._wrapped)  # type: ignore[attr-defined]

        self.step = 0
        self.seconds = 0.0  # of training alone: no set-up, evaluation or checkpoints
        self.result: dict[str, Any] = {}
        self._loss_sum = torch.zeros((), device=self.device)
        self._loss_steps = 0
        self._grad_norm: torch.Tensor | None = None
        self._layers: dict[str, LayerRate] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this run belongs to."""
        return {"config": self.config.model_dump(), "corpus": self.data.info["sha256"]}

    # ------------------------------------------------------------------ start and end

    def start(self, state: dict[str, Any] | None) -> None:
        """Takes up `state`, or begins at step 0."""
        processes.set_seed(self.config.training.seed)
        if state is not None:
            self._load(state)
        saved = [None] * len(self.observers) if state is None else state["observers"]
        for observer, own in zip(self.observers, saved, strict=True):
            observer.begin(self, own)  # one that cannot work says so here, before an older run is cleared away
        if state is None and self.rank == 0:
            shutil.rmtree(self.writer.path / "checkpoints", ignore_errors=True)
            shutil.rmtree(self.writer.path / "tensorboard", ignore_errors=True)
            self.writer.truncate({})
        self.writer.update(
            name=self.config.run_name,
            status="running",
            config=self.config.model_dump(),
            versions=versions(),
            machine=machine(self.device),
            parallel={"processes": self.world, "strategy": parallel.strategy_of(self.config.parallel)},
            corpus=self.data.info,
            parameters=parameter_table(self.model),
            parameter_count=sum(p.numel() for p in self.model.parameters()),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            result={},
        )
        if self.config.run.tensorboard:  # after run.json, which says whose folder it is
            self.writer.add_tensorboard(self.step)
        self.progress.start(self.config.run_name, self.config.training.steps, self.step)

    def run(self) -> None:
        """Trains to the end and writes down how it ended."""
        status = "finished"
        try:
            with between_steps() as may_stop:
                self._loop(may_stop)
        except DivergedError as reason:
            status = "diverged"
            self.result["reason"] = f"step {self.step}: {reason}"
            self.progress.note(f"{self.config.run_name} diverged at step {self.step}: {reason}")
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            why = "interrupted" if interrupted else f"{type(error).__name__}: {error}"
            with suppress(OSError):  # the disk may be what failed
                self.writer.update(stopped={"step": self.step, "reason": why})
            raise
        tokens = self.step * self.config.tokens_per_step
        self.result |= {
            "steps": self.step,
            "tokens": tokens,
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds if self.seconds else None,
        }
        if skipped := getattr(self.optimizer, "skipped_steps", 0):
            self.result["skipped_steps"] = skipped
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        self.writer.update(status=status, result=self.result, finished=finished)

    def take_steps(self, count: int) -> None:
        """Takes optimizer steps and nothing else: no metrics, evaluation or checkpoint. Raises LayerwiseError."""
        self._wrapped.train()
        try:
            for _ in range(count):
                self._train_step()
            self._check_finite()
        except DivergedError as reason:
            raise LayerwiseError(
                f"{self.config.run_name} diverged after {self.step} steps: {reason}; lower optimizer.lr"
            ) from None

    # ------------------------------------------------------------------ the loop

    def _loop(self, may_stop: Callable[[], None]) -> None:
        training, steps = self.config.training, self.config.training.steps
        self._wrapped.train()
        if self.step == 0 and training.eval_every:
            self.writer.append("metrics", {"step": 0, "tokens": 0, "seconds": 0.0, "val_loss": self._evaluate()})
        started, logged_at, logged_step = self._now(), self.seconds, self.step
        while self.step < steps:
            self._train_step()
            log, evaluate, checkpoint = map(self._due, (training.log_every, training.eval_every, training.checkpoint_every))
            if not (log or evaluate or checkpoint or self._layers):
                may_stop()
                continue
            self.seconds += self._now() - started
            tokens = self.step * self.config.tokens_per_step
            row: dict[str, Any] = {"step": self.step, "tokens": tokens, "seconds": self.seconds}
            if log:
                speed = (self.step - logged_step) * self.config.tokens_per_step / (self.seconds - logged_at)
                row |= {**self._numbers(), "tokens_per_second": speed}
                logged_at, logged_step = self.seconds, self.step
                counted = "images" if self.config.data.holds_images else "tokens"
                self.progress.numbers(self.step, f"loss {row['loss']:.4f}  {speed:,.0f} {counted}/s")
            if evaluate:
                row["val_loss"] = self._evaluate()
            if log or evaluate:
                self.writer.append("metrics", row)
            if self._layers:
                layers = {unit: rate._asdict() for unit, rate in self._layers.items()}
                self.writer.append("layers", {"step": self.step, "layers": layers})
            if checkpoint:
                self._check_finite()
                self._save()
            may_stop()
            started = self._now()

    def _train_step(self) -> None:
        """One optimizer step. Nothing here waits for the device."""
        training = self.config.training
        wholes = self.data.batch(self.step).split(training.accumulation)
        parts = [batch.share(self.rank, self.world).to(self.device) for batch in wholes]
        for number, (whole, part) in enumerate(zip(wholes, parts, strict=True), start=1):
            half = self._halves and 2 * number in (len(parts), 2 * len(parts))
            with parallel.gradients_shared(self._wrapped, half or number == len(parts)):
                # Averaging over the processes makes means over the whole batch of these, equal shares or not.
                divisor = len(parts) * len(whole) / (len(part) * self.world)
                value = loss(self._wrapped, part.inputs, part.targets) / divisor
                value.backward()
            self._loss_sum += value.detach()
            if half:
                self.optimizer.hold_half()  # type: ignore[attr-defined]
        if training.clip_norm is not None:
            self._grad_norm = parallel.clip(self.model, training.clip_norm)
        with ExitStack() as around:
            for observer in self.observers:
                around.enter_context(observer.around_step(self.step + 1))
            try:
                self.optimizer.step()
            except NonFiniteError as error:
                raise DivergedError(str(error).partition(";")[0]) from None
        self.step += 1
        self.optimizer.zero_grad()
        recorded = training.record_every and self._due(training.record_every)
        self._layers = self._layer_rates() if recorded else {}  # now: the next step's rate is another
        self.scheduler.step()
        self._loss_steps += 1
        for observer in self.observers:
            observer.after_step(self.step)

    def _numbers(self) -> dict[str, Any]:
        """The loss since the last line, and this step's rate and gradient norm."""
        mean = float(self._agreed_loss_sum()) / self._loss_steps
        if not math.isfinite(mean):
            raise DivergedError(f"the training loss is {mean}")
        self._loss_sum.zero_()
        self._loss_steps = 0
        self.result["loss"] = mean
        return {
            "loss": mean,
            "lr": (self.config.optimizer.lr or 0.0) * self._schedule(self.step - 1),
            "grad_norm": None if self._grad_norm is None else float(self._grad_norm),
        }

    def _evaluate(self) -> float:
        """Mean loss over the validation sequences, in nats per token."""
        training = self.config.training
        self._wrapped.eval()
        total, sequences = torch.zeros((), device=self.device), 0
        with torch.no_grad():
            for batch in self.data.validation(training.batch_size // training.accumulation):
                share = batch.share(self.rank, self.world)
                # Every process makes every pass, as FSDP2 needs: one that has no share of it repeats another's.
                moved = (share if len(share) else batch.share(0, self.world)).to(self.device)
                total += loss(self._wrapped, moved.inputs, moved.targets) * len(share)
                sequences += len(batch)
        self._wrapped.train()
        value = float(processes.total(total)) / sequences
        if not math.isfinite(value):
            raise DivergedError(f"the validation loss is {value}")
        self.result["val_loss"] = value
        self.result["best_val_loss"] = min(value, self.result.get("best_val_loss", math.inf))
        return value

    def _agreed_loss_sum(self) -> torch.Tensor:
        """The sum of losses of the whole batches, and from now on every process's."""
        if self.world > 1:
            self._loss_sum = processes.total(self._loss_sum) / self.world
        return self._loss_sum

    def _check_finite(self) -> None:
        """No checkpoint of a run that is lost already."""
        if not math.isfinite(float(self._agreed_loss_sum())):
            raise DivergedError("the training loss is not finite")
        if self._grad_norm is not None and not math.isfinite(float(self._grad_norm)):
            raise DivergedError("the gradient norm is not finite")

    def _schedule(self, step: int) -> float:
        return self.config.schedule.factor(step, self.config.training.steps)

    def _due(self, every: int) -> bool:
        """Whether what is done at every so many steps, and at the last one, is done now."""
        return self.step == self.config.training.steps or (every > 0 and self.step % every == 0)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # ------------------------------------------------------------------ records and checkpoints

    def _layer_rates(self) -> dict[str, LayerRate]:
        """The rates of the step just taken, with what observers (FLeRM) multiply them by."""
        rates = {} if self.rank > 0 else unit_rates(self.optimizer)
        for observer in self.observers:
            for unit, rate in rates.items():
                rates[unit] = rate._replace(lr=rate.lr * observer.multiplier(parameter_of(unit)))
        return rates

    def _save(self) -> None:
        random = processes.from_all(random_state())
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "result": self.result,
            "loss_sum": self._loss_sum,
            "loss_steps": self._loss_steps,
            "lengths": self.writer.lengths(),
            "model": parallel.whole(self.model.state_dict()),
            "optimizer": parallel.whole(self.optimizer.state_dict()),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
            "random": random[0],
            "random_of_others": random[1:],
            "observers": [observer.state_dict() for observer in self.observers],
        }
        if self.rank == 0:
            folder = self.writer.path / "checkpoints"
            save_checkpoint(folder, self.step, state, self.identity, self.config.training.keep)

    def _load(self, state: dict[str, Any]) -> None:
        """Raises LayerwiseError where the state is not of this run."""
        if (count := len(state.get("observers", ()))) != len(self.observers):
            raise LayerwiseError(
                f"checkpoint in {self.writer.path} was written with {count} observers,"
                f" this run has {len(self.observers)}: resume with the same ones"
            )
        try:
            parallel.load_model(self.model, state["model"])
            parallel.load_optimizer(self.optimizer, state["optimizer"])
            lambdas = [None] * len(self.scheduler.lr_lambdas)  # functions are not saved
            self.scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": lambdas})
            self.step, self.seconds, self.result = state["step"], state["seconds"], dict(state["result"])
            self._loss_sum = state["loss_sum"].to(self.device)
            self._loss_steps = state["loss_steps"]
            for stream in self.writer.truncate(state["lengths"]):
                self.progress.note(f"{stream}.jsonl is shorter than it was at step {self.step}: lines are lost")
            random = [state["random"], *state["random_of_others"]]
            if self.rank < len(random):
                set_random_state(random[self.rank])
            else:
                processes.set_seed(self.config.training.seed, self.step)
        except LayerwiseError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            where = f"checkpoint in {self.writer.path}"
            raise LayerwiseError(f"{where} is of another model or optimizer: {error!s:.300}") from None
