"""peft's LoRA: each adapter matrix has its own direction, noise and rate; frozen weights have no state.

python examples/peft_lora.py
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import layerwise as lw


def main() -> tuple[list[float], dict[str, lw.LayerRate]]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    adapters = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, lora_dropout=0.0)
    model = get_peft_model(GPT2LMHeadModel(config), adapters)
    optimizer = lw.Lanton(lw.param_groups(model), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
    tokens = (torch.arange(8)[:, None] + torch.arange(16)) % 32
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, optimizer.layer_rates()


if __name__ == "__main__":
    losses, rates = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for unit, rate in rates.items():
        print(f"{unit}: lr {rate.lr:.2e}, noise {rate.noise:.2e}")
