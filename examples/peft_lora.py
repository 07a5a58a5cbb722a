"""peft's LoRA: each adapter matrix has its own direction, noise and rate; frozen weights have no state.

python examples/peft_lora.py OUTPUT_DIR      killed and started again, it goes on from its last checkpoint
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel

import layerwise as lw


def train(folder: str) -> tuple[PeftModel, list[dict[str, float]]]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    adapters = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, lora_dropout=0.0)
    model = get_peft_model(GPT2LMHeadModel(config), adapters)
    optimizer = lw.Lanton(lw.param_groups(model), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
    tokens = (torch.arange(8)[:, None] + torch.arange(16)) % 32
    logs: list[dict[str, float]] = []

    checkpoint = Path(folder, "checkpoint.pt")
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        set_peft_model_state_dict(model, state["adapters"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        logs = state["logs"]
    for step in range(len(logs), 20):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates = {f"lr/{unit}": rate.lr for unit, rate in optimizer.layer_rates().items()}
        logs.append({"loss": loss.item(), **rates})
        schedule.step()
        if (step + 1) % 5 == 0:
            state = {
                "adapters": get_peft_model_state_dict(model),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "random": torch.get_rng_state(),  # of the dropout
                "logs": logs,
            }
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)  # so that the last good one always stands
    return model, logs


if __name__ == "__main__":
    for entry in train(sys.argv[1])[1]:
        print(entry)
