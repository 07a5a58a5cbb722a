"""Your own loop with accelerate: accumulation, clipping, a schedule and checkpoints, on one process or many.

torchrun --nproc_per_node 2 examples/accelerate_loop.py OUTPUT_DIR

Killed and started again, it goes on from its last checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise as lw


class Run:
    """Everything that a checkpoint holds."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        optimizer = lw.Lanton(lw.param_groups(model), lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)
        x = torch.randn(128, 8)
        data = DataLoader(TensorDataset(x, x[:, :1].sin()), batch_size=8)
        self.model, self.optimizer, self.data, self.schedule = self.accelerator.prepare(model, optimizer, data, schedule)
        self.logs: list[dict[str, float]] = []

    def epoch(self) -> None:
        for x, y in self.data:
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.mse_loss(self.model(x), y)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        rates = {f"lr/{unit}": rate.lr for unit, rate in lw.layer_rates(self.optimizer).items()}
        self.logs.append({"loss": loss.item(), **rates})


def train(folder: str, epochs: int = 2) -> Run:
    run = Run()
    done = sorted(Path(folder).glob("after-*"))
    if done:
        run.accelerator.load_state(str(done[-1]))
    for epoch in range(len(done), epochs):
        run.epoch()
        run.accelerator.save_state(f"{folder}/unfinished")
        run.accelerator.wait_for_everyone()
        if run.accelerator.is_main_process:
            Path(folder, "unfinished").rename(Path(folder, f"after-{epoch + 1}"))
        run.accelerator.wait_for_everyone()
    return run


if __name__ == "__main__":
    logs = train(sys.argv[1]).logs
    if PartialState().is_main_process:
        for entry in logs:
            print(entry)
