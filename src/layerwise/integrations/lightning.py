"""lightning: one optimizer from ``configure_optimizers``, and a callback that logs the layer rates.

def configure_optimizers(self):
    return lw.Lanton(lw.param_groups(self), lr=2e-3)

Trainer(callbacks=[LayerRates()])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from layerwise.common.checked import PositiveInt, checked
from layerwise.function_space import Watch, WatchRecord, watch
from layerwise.integrations.logged import Level, RateLog
from layerwise.optim.optimizer import layerwise_optimizer


@checked
class LayerRates(Callback):  # type: ignore[misc]
    """Logs ``layer_lr/NAME`` and ``layer_squared_norm/NAME``: at most 512 names a step.

    lightning moves the schedule on before callbacks see a step, so these are the rates of the step to come.

    Args:
        every: how many optimizer steps apart; None: the trainer's own interval.
        by: ``"role and block"`` (means over the units of one role in one block), ``"role"``, ``"block"`` or ``"unit"``.
        only: glob patterns of parameters; the others are left out.
    """

    def __init__(
        self, every: PositiveInt | None = None, by: Level = "role and block", only: str | Sequence[str] = "*"
    ) -> None:
        self.every = every
        self.log_rates = RateLog(by, only)
        self._logged = 0  # with accumulation, several batches end at one step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        every = trainer.log_every_n_steps if self.every is None else self.every
        if every == 0 or step % every or step == self._logged:  # 0: lightning logs nothing
            return
        self._logged = step
        if trainer.is_global_zero:
            rates = {key: value for opt in trainer.optimizers for key, value in self.log_rates(opt).items()}
            for logger in trainer.loggers:
                logger.log_metrics(rates, step=step)


@checked
class WatchOptimizers(Callback):  # type: ignore[misc]
    """``lw.watch`` of every optimizer of a run: its numbers go to the trainer's loggers.

    Args:
        every: how many optimizer steps apart; None: the trainer's own interval.
        options: of ``lw.watch``.

    Attributes:
        watches: one for each optimizer.
    """

    def __init__(self, every: PositiveInt | None = None, **options: Any) -> None:
        self.every = every
        self.options = options
        self.watches: list[Watch] = []
        self._saved: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = (trainer.log_every_n_steps or 1) if self.every is None else self.every

        def log(record: WatchRecord) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(record.scalars(), step=record.step)

        options = {**self.options, "to": [log, self.options.get("to")]}
        self.watches = [watch(pl_module, optimizer, every, **options) for optimizer in trainer.optimizers]
        for one, state in zip(self.watches, self._saved, strict=False):
            one.load_state_dict(state)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for one in self.watches:
            one.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"watches": [one.state_dict() for one in self.watches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = list(state["watches"])


class WatchReplicas(Callback):  # type: ignore[misc]
    """Shows the optimizers each process's own gradients, for ``NoiseAdaptive(reference="replicas")`` under DDP."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            layerwise_optimizer(optimizer).watch_replicas(trainer.strategy.model)
