"""The error of each nuclear-norm method on real gradient differences, and what it does to LANTON's rates.

    python benchmarks/noise_estimates.py            # about two minutes on two cores

A small GPT-2 learns the standard library's source, byte by byte. At every step each method measures every hidden matrix's
gradient difference; H is LANTON's moving average of the squares, and a unit's multiplier is `(H_min / H)^(1/4)`.
Writes `benchmarks/results/noise_estimates.md`.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import machine
from layerwise.geometry import nuclear_norm, polar

RESULTS = Path(__file__).parent / "results"
BETA = 0.95
SETTLED = 20  # steps after which the moving average is looked at


def quintic(g: Tensor) -> Tensor:
    """What a second Newton-Schulz of the usual kind would give."""
    return (g * polar(g, "quintic")).sum((-2, -1))


METHODS = {
    "svd (float64)": lambda d, _: torch.linalg.svdvals(d.double()).sum(-1),
    "gram": lambda d, _: nuclear_norm(d, "gram"),
    "polar": lambda d, _: nuclear_norm(d, "polar"),
    "<G, quintic(G)>": lambda d, _: quintic(d),
    "lanczos, 8 probes (auto)": lambda d, t: nuclear_norm(d, "lanczos", seed=t),
    "lanczos, 4 probes": lambda d, t: nuclear_norm(d, "lanczos", seed=t, probes=4),
    "lanczos, 16 probes": lambda d, t: nuclear_norm(d, "lanczos", seed=t, probes=16),
}


def corpus() -> Tensor:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.tensor(list(b"".join(f.read_bytes() for f in files)))


def hidden_gradients(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Gradients of the hidden matrices, q, k and v apart, as (d_out, d_in)."""
    out: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if p.ndim == 2 and ".h." in name and p.grad is not None:
            parts = p.grad.T.chunk(3) if "c_attn" in name else (p.grad.T,)
            out |= {f"{name}[{i}]": part.clone() for i, part in enumerate(parts)}
    return out


def trajectories(width: int, layers: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """For each method and step, the nuclear norm of every unit's gradient difference."""
    torch.manual_seed(0)
    data = corpus()
    shape = {"vocab_size": 256, "n_positions": 128, "n_embd": width, "n_layer": layers, "n_head": 4}
    model = GPT2LMHeadModel(
        GPT2Config(**shape, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    previous: dict[str, Tensor] = {}
    for step in range(steps):
        starts = torch.randint(0, len(data) - 128, (8,)).tolist()
        batch = torch.stack([data[i : i + 128] for i in starts])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        gradients = hidden_gradients(model)
        if previous:
            for name, method in METHODS.items():
                values[name].append({u: method(g - previous[u], step).item() for u, g in gradients.items()})
        previous = gradients
        optimizer.step()
    return values


def multipliers(series: list[dict[str, float]]) -> Tensor:
    """`(H_min / H)^(1/4)` of every unit at every settled step, `[steps, units]`."""
    squares = torch.tensor([list(row.values()) for row in series], dtype=torch.float64).square()
    averages = [squares[0]]
    for row in squares[1:]:
        averages.append(BETA * averages[-1] + (1 - BETA) * row)
    h = torch.stack(averages)[SETTLED:]
    return (h.amin(-1, keepdim=True) / h) ** 0.25


def table(values: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = [
        "| method | error of one norm: mean, deviation, largest | error of a multiplier: mean, 95 %, largest |",
        "|---|---|---|",
    ]
    truth, *_ = values.values()
    exact = torch.tensor([list(row.values()) for row in truth], dtype=torch.float64)
    right = multipliers(truth)
    for name, series in list(values.items())[1:]:
        error = torch.tensor([list(row.values()) for row in series], dtype=torch.float64) / exact - 1
        off = (multipliers(series) / right - 1).abs()
        lines.append(
            f"| {name} | {error.mean():+.1%}, {error.std():.1%}, {error.abs().max():.1%} "
            f"| {off.mean():.1%}, {off.flatten().quantile(0.95):.1%}, {off.max():.1%} |"
        )
    lines += ["", f"Exact multipliers range from {right.min():.2f} to 1 (mean {right.mean():.2f})."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    lines = [
        "# Nuclear norms of real gradient differences",
        "",
        "Written by `benchmarks/noise_estimates.py`: every hidden matrix of a GPT-2 "
        f"({args.layers} layers, width {args.width}, batches of 1024 bytes), {args.steps} steps of AdamW; "
        "against a float64 SVD.",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine.describe().items()) + ".",
        "",
        *table(trajectories(args.width, args.layers, args.steps)),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "noise_estimates.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
