"""lightning with D-Muon: one optimizer object for all parameters, AdamW's among them, and one schedule over its groups.

python examples/lightning_module.py OUTPUT_DIR
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise as lw
from layerwise.integrations.lightning import LayerRates


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.network(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = lw.DMuon(lw.param_groups(self), lr=0.02, noise=lw.NoiseAdaptive())
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: str, epochs: int, resume_from: str | None = None) -> Regression:
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(64, 8)
    data = DataLoader(TensorDataset(x, x[:, :1].sin()), batch_size=16)
    model = Regression()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,  # of the gradients
        log_every_n_steps=2,
        logger=CSVLogger(folder, name="logs", version=""),
        callbacks=[LayerRates()],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, data, ckpt_path=resume_from)
    trainer.save_checkpoint(Path(folder, f"after-{epochs}.ckpt"))
    return model


def main(folder: str) -> list[dict[str, str]]:
    whole = fit(f"{folder}/whole", 4)
    fit(f"{folder}/first", 2)
    resumed = fit(f"{folder}/second", 4, f"{folder}/first/after-2.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    with open(f"{folder}/whole/logs/metrics.csv") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    for row in main(sys.argv[1]):
        print(row)
