"""lightning with D-Muon: one optimizer object for all parameters, AdamW's among them, and one schedule over its groups.

python examples/lightning_module.py OUTPUT_DIR      killed and started again, it goes on from its last checkpoint
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise as lw
from layerwise.integrations.lightning import LayerRates


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.network(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = lw.DMuon(lw.param_groups(self), lr=0.02, rates=lw.NoiseAdaptive())
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(folder: str) -> Regression:
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(64, 8)
    data = DataLoader(TensorDataset(x, x[:, :1].sin()), batch_size=16)
    model = Regression()
    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        gradient_clip_val=1.0,  # of the gradients
        log_every_n_steps=2,
        logger=CSVLogger(folder, name="logs"),
        callbacks=[LayerRates(by="unit"), ModelCheckpoint(folder, save_last=True)],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path="last")
    return model


def logged(folder: str) -> list[dict[str, str]]:
    """The rows of every run's log in the folder, one after the other."""
    rows = []
    for file in sorted(Path(folder, "logs").glob("*/metrics.csv")):
        with file.open() as lines:
            rows += csv.DictReader(lines)
    return rows


if __name__ == "__main__":
    train(sys.argv[1])
    for row in logged(sys.argv[1]):
        print(row)
