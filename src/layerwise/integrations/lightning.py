"""lightning: one optimizer from ``configure_optimizers``, and a callback that logs the layer rates.

def configure_optimizers(self):
    return lw.Lanton(lw.param_groups(self), lr=2e-3)

Trainer(callbacks=[LayerRates()])
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from layerwise.errors import LayerwiseError
from layerwise.integrations.logged import layerwise_optimizer, rates_to_log


class LayerRates(Callback):  # type: ignore[misc]
    """Logs ``layer_lr/UNIT`` and ``layer_noise/UNIT`` every ``every`` optimizer steps (None: the trainer's own interval).

    lightning moves the schedule on before callbacks see a step, so these are the rates of the step to come.
    """

    def __init__(self, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise LayerwiseError(
                f"LayerRates(every={every}): use 1 or more, or None for the trainer's interval"
            )
        self.every = every
        self._logged = 0  # with accumulation, several batches end at one step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        every = trainer.log_every_n_steps if self.every is None else self.every
        if every == 0 or step % every or step == self._logged:  # 0: lightning logs nothing
            return
        self._logged = step
        if trainer.is_global_zero:
            rates = {key: value for opt in trainer.optimizers for key, value in rates_to_log(opt).items()}
            for logger in trainer.loggers:
                logger.log_metrics(rates, step=step)


class WatchReplicas(Callback):  # type: ignore[misc]
    """Shows the optimizers each process's own gradients, for ``NoiseAdaptive(reference="replicas")`` under DDP."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            layerwise_optimizer(optimizer).watch_replicas(trainer.strategy.model)
