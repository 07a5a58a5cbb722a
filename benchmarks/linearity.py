"""First order against whole updates, tensor by tensor, over training.

    python benchmarks/linearity.py

writes benchmarks/results/linearity.md, linearity.json and docs/figures/linearity.png (needs transformers and matplotlib;
some minutes on one core).
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import layerwise as lw
from script import RESULTS, documented_parser, write_page

ROOT = Path(__file__).parent.parent
WORDS, LENGTH, BATCH = 64, 32, 16
#: First orders below this are drawn at it: routers' are 0 but for rounding.
FLOOR = 1e-6
KINDS = ("router", "experts", "attention", "MLP", "embedding, head", "gain, bias")


def gpt2(width: int) -> nn.Module:
    heads = max(2, width // 16)
    config = GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=width, n_layer=2, n_head=heads)
    return GPT2LMHeadModel(config)


def llama(width: int) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**decoder(width)))


def mixtral(width: int) -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**decoder(width), num_local_experts=8, num_experts_per_tok=2))


def decoder(width: int) -> dict[str, Any]:
    return {
        "vocab_size": WORDS,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": max(2, width // 16),
        "num_key_value_heads": max(2, width // 16),
        "max_position_embeddings": LENGTH,
    }


MODELS: dict[str, Callable[[int], nn.Module]] = {"GPT-2": gpt2, "Llama": llama, "Mixtral": mixtral}


def kind(name: str, shape: torch.Size) -> str:
    """What a tensor does."""
    if "gate.weight" in name or "router" in name:
        return "router"
    if "experts" in name:
        return "experts"
    if len(shape) < 2:
        return "gain, bias"
    if any(part in name for part in ("wte", "wpe", "embed", "lm_head")):
        return "embedding, head"
    return "attention" if "attn" in name else "MLP"


def batches(seed: int, sequences: int = BATCH) -> Iterator[Tensor]:
    """Sequences of a random Markov chain, in which a word has eight likely successors."""
    chain = torch.Generator().manual_seed(7)
    logits = 3.0 * torch.randn(WORDS, WORDS, generator=chain)
    generator = torch.Generator().manual_seed(seed)
    while True:
        words = [torch.randint(0, WORDS, (sequences, 1), generator=generator)]
        for _ in range(LENGTH - 1):
            words.append(torch.multinomial(logits[words[-1][:, 0]].softmax(-1), 1, generator=generator))
        yield torch.cat(words, 1)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, words: Tensor, watcher: Any, other: Any) -> float:
    optimizer.zero_grad()
    logits = model(input_ids=words).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())
    loss.backward()
    with watcher.step(other):
        optimizer.step()
    return loss.item()


def over_training(name: str, steps: int, every: int, lr: float) -> list[dict[str, Any]]:
    """Both rates of every tensor at some steps of a run with signs as steps."""
    torch.manual_seed(0)
    model = MODELS[name](32)
    optimizer = lw.Signum(lw.param_groups(model), lr=lr)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    recorder = lw.FunctionSpaceRecorder(model, optimizer, every, method="difference")
    data, other = batches(1), batches(2)
    for _ in range(steps):
        train_step(model, optimizer, next(data), recorder, lambda: {"input_ids": next(other)})
    return [
        {
            "model": name,
            "step": r.step,
            "tensor": n,
            "kind": kind(n, shapes[n]),
            "whole": rate.value,
            "linear": rate.linear,
        }
        for r in recorder.records
        for n, rate in r.rates.items()
        if rate.value > 3 * rate.stderr
    ]


def training_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | tensors | measurements | first order / whole: median (5 % to 95 %) | off by more than 10 % |",
        "|---|---|---|---|---|",
    ]
    for model in MODELS:
        for what in KINDS:
            ratios = [r["linear"] / r["whole"] for r in rows if r["model"] == model and r["kind"] == what]
            if ratios:
                low, high = torch.tensor(ratios).quantile(torch.tensor([0.05, 0.95])).tolist()
                off = sum(abs(ratio - 1) > 0.1 for ratio in ratios) / len(ratios)
                middle = f"{statistics.median(ratios):.3g} ({low:.3g} to {high:.3g})"
                lines.append(f"| {model} | {what} | {len(ratios)} | {middle} | {100 * off:.0f} % |")
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = dict(zip(KINDS, ("#cc3311", "#ee7733", "#0077bb", "#33bbee", "#009988", "#bbbbbb"), strict=True))
    figure, axes = plt.subplots(1, len(MODELS), figsize=(11, 3.9), sharex=True, sharey=True)
    for ax, model in zip(axes, MODELS, strict=True):
        for what in reversed(KINDS):
            points = [(max(r["linear"], FLOOR), r["whole"]) for r in rows if r["model"] == model and r["kind"] == what]
            if points:
                ax.scatter(*zip(*points, strict=True), s=9, alpha=0.7, color=colours[what], label=what, linewidths=0)
        span = [FLOOR, max(r["whole"] for r in rows)]
        ax.plot(span, span, color="#444444", linewidth=0.8)
        ax.set(xscale="log", yscale="log", title=model, xlabel="first order (exact)")
    axes[0].set_ylabel("whole update (difference)")
    labels = {}
    for ax in axes:
        handles, names = ax.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend([labels[k] for k in KINDS], KINDS, loc="outside lower center", ncol=len(KINDS), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    options = documented_parser(__doc__)
    options.add_argument("--steps", type=int, default=61)
    options.add_argument("--every", type=int, default=15)
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--output", type=Path, default=RESULTS)
    options.add_argument("--figure", type=Path, default=ROOT / "docs/figures/linearity.png")
    given = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    trained = [row for name in MODELS for row in over_training(name, given.steps, given.every, given.lr)]
    given.output.joinpath("linearity.json").write_text(json.dumps(trained) + "\n")
    steps = f"{given.steps} steps of signs, lr {given.lr:g}, measured every {given.every}"
    text = [
        "# First order against whole updates",
        "",
        f"From `python benchmarks/linearity.py`. Two blocks of width 32, {WORDS} words of a Markov chain, "
        f"batch {BATCH} x {LENGTH}; {steps}.",
        "Mixtral: eight experts, two of them chosen.",
        "",
        *training_table(trained),
    ]
    write_page(given.output / "linearity.md", text)
    draw(trained, given.figure)


if __name__ == "__main__":
    main()
