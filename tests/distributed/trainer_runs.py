"""transformers' Trainer on the processes of a test cluster, with function-space rates recorded or matched."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import layerwise as lw
from layerwise.integrations.transformers import FunctionSpaceCallback

BATCH, ACCUMULATION = 8, 2
OBSERVERS = {
    "recorder": partial(lw.FunctionSpaceRecorder, every=2, probes=8),
    "flerm": partial(lw.FLeRM, base="uniform", probes=8),
}


class Rows(Dataset):
    def __init__(self, rows: int = 64, length: int = 9, vocabulary: int = 16) -> None:
        self.tokens = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[row], "labels": self.tokens[row]}


class InOrder(Trainer):
    """Without shuffling: every world size then sees the same global batches."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_run(folder: str, observer: str, steps: int = 3, resume: str | None = None) -> dict[str, Any]:
    """Weights and what was measured, after some steps of accumulated gradients."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, and not used
    try:
        set_seed(0)
        data = Rows()
        config = GPT2Config(
            vocab_size=16,
            n_positions=9,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        )
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH // world,
            gradient_accumulation_steps=ACCUMULATION,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            adam_epsilon=1e-3,  # entries with a gradient of rounding noise do not move by a whole step
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        callback = FunctionSpaceCallback(OBSERVERS[observer], {"input_ids": Rows(5).tokens.flip(1)})
        model = GPT2LMHeadModel(config).double()
        trainer = InOrder(model=model, args=arguments, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        watcher = callback.observer
        found: dict[str, Any] = {
            "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
            "wrapped": type(trainer.model_wrapped).__name__,
            "steps": watcher.steps,
        }
        if isinstance(watcher, lw.FLeRM):
            return found | {"lrs": watcher.learning_rates()}
        return found | {"rates": [record.rates for record in watcher.records]}
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
