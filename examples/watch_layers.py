"""What each layer does while it trains, in a picture: a GPT-2 of 12 blocks reads a module of Python's standard library.

    python examples/watch_layers.py

writes watch.jsonl (a line a record) and watch.png: how far each layer moves relative to its weights, and the multiplier that
`DualMuon`'s rule gives to its rate. The picture could be drawn from the file as well, later or elsewhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import layerwise as lw

SEQUENCE = 64


def train(folder: str | Path, steps: int = 200) -> lw.Watch:
    """Train, and draw what the watch has seen."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=SEQUENCE, n_embd=64, n_layer=12, n_head=4, resid_pdrop=0, attn_pdrop=0)
    )
    optimizer = lw.DualMuon(lw.param_groups(model, batch(text)), lr=8e-3)
    watch = lw.watch(model, optimizer, every=5, to=folder / "watch.jsonl")
    for _ in range(steps):
        model(**batch(text)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    figure, axes = plt.subplots(1, 2, figsize=(12, 8), layout="constrained")
    for ax, quantity in zip(axes, ("ratio", "multiplier"), strict=True):
        lw.plot_watch(folder / "watch.jsonl", quantity, ax=ax)
    figure.savefig(folder / "watch.png", dpi=80)
    return watch


def batch(text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sixteen pieces of the text, the labels those of the next byte."""
    starts = torch.randint(len(text) - SEQUENCE, (16,))
    pieces = torch.stack([text[start : start + SEQUENCE] for start in starts])
    return {"input_ids": pieces, "labels": pieces}


if __name__ == "__main__":
    train(".")
