"""Noise between replicas inside a trainer, on two processes under torchrun: python trainer_run.py FOLDER hf|lightning."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise as lw
from layerwise.optim.optimizer import layerwise_optimizer

RULE = lw.NoiseAdaptive(reference="replicas")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(x), y)}


def data() -> TensorDataset:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :1].sin())


def hf(folder: str) -> tuple[nn.Module, lw.LayerwiseOptimizer]:
    from transformers import Trainer, TrainingArguments

    from layerwise.integrations.transformers import trainer_optimizer, watch_replicas

    trainer = Trainer(
        model=Net(),
        args=TrainingArguments(
            output_dir=folder,
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=0.05,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            ddp_backend="gloo",
            disable_tqdm=True,
        ),
        train_dataset=[{"x": x, "y": y} for x, y in data()],
        optimizer_cls_and_kwargs=trainer_optimizer(lw.Lanton, lr=0.02, rates=RULE),
    )
    watch_replicas(trainer)
    trainer.train()
    return trainer.model, layerwise_optimizer(trainer.optimizer)


def lightning(folder: str) -> tuple[nn.Module, lw.LayerwiseOptimizer]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from layerwise.integrations.lightning import WatchReplicas

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            return self.net(*batch)["loss"]

        def configure_optimizers(self) -> lw.LayerwiseOptimizer:
            return lw.Lanton(lw.param_groups(self), lr=0.02, rates=RULE)

    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        accumulate_grad_batches=2,
        gradient_clip_val=0.05,
        callbacks=[WatchReplicas()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, DataLoader(data(), batch_size=4))
    return module, trainer.optimizers[0]


def main(folder: str, which: str) -> None:
    torch.set_num_threads(1)
    model, optimizer = {"hf": hf, "lightning": lightning}[which](folder)
    assert dist.get_world_size() == 2
    rates = optimizer.layer_rates().values()
    assert all(rate.squared_norm > 0 for rate in rates), rates
    assert len({rate.multiplier for rate in rates}) > 1
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(theirs, mine)
    assert torch.equal(*theirs)
    print("the same weights")
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort one process in four at its exit, of a plain DistributedDataParallel too (torch 2.13)


if __name__ == "__main__":
    main(*sys.argv[1:])
