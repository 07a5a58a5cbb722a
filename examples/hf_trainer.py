"""transformers' Trainer with LANTON: accumulation, clipping, a schedule, layer rates in the logs, and resuming.

python examples/hf_trainer.py OUTPUT_DIR      killed and started again, it goes on from its last checkpoint
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import layerwise as lw
from layerwise.function_space import FunctionSpaceRecorder
from layerwise.integrations.transformers import FunctionSpaceCallback, log_layer_rates, trainer_optimizer


class Counting(Dataset):
    """Sequences that count upwards from a random start: something a small model learns in a few steps."""

    def __init__(self, rows: int = 64, length: int = 16, vocabulary: int = 32) -> None:
        start = torch.randint(vocabulary, (rows, 1), generator=torch.Generator().manual_seed(0))
        self.tokens = (start + torch.arange(length)) % vocabulary

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[row], "labels": self.tokens[row]}


def make_trainer(output_dir: str) -> Trainer:
    set_seed(0)
    data = Counting()
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    arguments = TrainingArguments(
        output_dir=output_dir,
        max_steps=6,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,  # clips gradients; a step's length is the rate's business
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=2,
        save_steps=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    measured = {"input_ids": data.tokens[:4]}
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=data,
        optimizer_cls_and_kwargs=trainer_optimizer(lw.Lanton, lr=0.02, weight_decay=0.1),
        callbacks=[FunctionSpaceCallback(partial(FunctionSpaceRecorder, every=3, probes=4), measured)],
    )
    log_layer_rates(trainer, by="unit")
    return trainer


def train(output_dir: str) -> Trainer:
    trainer = make_trainer(output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output_dir) if Path(output_dir).exists() else None)
    return trainer


if __name__ == "__main__":
    for entry in train(sys.argv[1]).state.log_history:
        print(entry)
