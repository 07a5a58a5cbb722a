"""LoRA at another rank than the one that was tuned: one call, and transformers' `Trainer` as it was.

python examples/lora_rank.py OUTPUT_DIR
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import layerwise as lw

TUNED_RANK, TUNED_RATE = 2, 2e-3


def adapted(rank: int) -> PeftModel:
    """The frozen model with adapters of a rank; in your case `AutoModelForCausalLM.from_pretrained(...)`."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    adapters = LoraConfig(r=rank, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    return get_peft_model(GPT2LMHeadModel(config), adapters)


def train(folder: str) -> tuple[dict[str, float], float]:
    """The matched rates, by parameter name, and the mean loss."""
    model = adapted(rank=16)
    pieces = [(torch.arange(16) * k + k) % 32 for k in range(1, 65)]
    data = [{"input_ids": piece, "labels": piece} for piece in pieces]
    batches = [{"input_ids": (b := torch.stack(pieces[k : k + 8])), "labels": b} for k in range(0, 64, 8)]

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=TUNED_RATE)
    match = lw.match_lora(model, optimizer, batches, base_rank=TUNED_RANK)
    rates = match.learning_rates()
    print(match)

    arguments = TrainingArguments(
        folder, max_steps=20, per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    return rates, trainer.train().training_loss


if __name__ == "__main__":
    train(sys.argv[1])
