"""What the dual norms of the rate rule measure: against exact ones, and against LANTON's gradient differences.

    python benchmarks/rate_rule_norms.py                      # about ten minutes on one core
    python benchmarks/rate_rule_norms.py --models llama-tiny --batches 16 --steps 40

Trains small models with `DualMuon(momentum_warmup=0, adamw_nu=1.0)`. Over the ten steps before each of some
moments it takes, of every matrix, the mean square of four dual norms, each over its white-noise value: of the direction
as the step has it (`<u, NewtonSchulz(u)>`), of the direction exactly (singular values), of the gradient, and of the
difference of two gradients in turn (LANTON's noise). Each gives multipliers by the rule's formula. Writes
`benchmarks/results/rate_rule_norms.md`: how far those of the other three lie from the exact direction's, as the root
mean square of the logarithm of their ratio, and their correlation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import layerwise as lw
import machine
from layerwise.geometry.layout import Layout
from layerwise.lab.config.schema import Config
from layerwise.lab.data.batches import TextData
from layerwise.lab.models.families import build_model, loss
from layerwise.lab.models.family import Examples
from script import RESULTS, documented_parser, write_page

BASE_RATES = {"gpt2-tiny": 0.032, "llama-tiny": 0.016}
WINDOW = 10
KINDS = ("direction", "direction, exact", "gradient", "difference")


def exact(stack: Tensor) -> Tensor:
    """Nuclear norms over those of white noise, `[k, m, n] -> [k]`."""
    m, n = stack.shape[-2:]
    return torch.linalg.svdvals(stack).sum(-1) / (min(m, n) * max(m, n) ** 0.5)


class Watched:
    """The matrices of a model under one optimizer, and their norms over a window of steps."""

    def __init__(self, model: nn.Module, optimizer: lw.LayerwiseOptimizer) -> None:
        self.optimizer = optimizer
        self.members: list[tuple[nn.Parameter, Layout]] = [
            (p, group["layout"])
            for group in optimizer.param_groups
            if repr(group["update"]) == "lmo"
            for p in group["params"]
        ]
        self.before: dict[nn.Parameter, Tensor] = {}
        self.squares: dict[str, list[Tensor]] = {}

    def note(self) -> None:
        """After a backward pass, before the optimizer's step."""
        found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        for p, layout in self.members:
            assert p.grad is not None
            momentum = torch.lerp(self.optimizer.state[p]["momentum_buffer"], p.grad, 0.05)
            ahead = torch.lerp(p.grad, momentum, 0.95)
            tensors = {"direction, exact": ahead, "gradient": p.grad, "difference": p.grad - self.before[p]}
            for kind, tensor in tensors.items():
                found[kind] += [exact(stack) for stack in layout.to_matrices(tensor)]
            for stack in layout.to_matrices(ahead):
                m, n = stack.shape[-2:]
                inner = (stack * lw.geometry.Spectral().lmo(stack)).sum((-2, -1))
                found["direction"].append(inner / lw.geometry.Spectral().white_noise_dual(m, n))
        for kind, norms in found.items():
            self.squares.setdefault(kind, []).append(torch.cat(norms).square())

    def keep_gradients(self) -> None:
        self.before = {p: p.grad.clone() for p, _ in self.members if p.grad is not None}

    def multipliers(self, size: Tensor) -> dict[str, np.ndarray]:
        """By kind, of the window's means; the window begins anew."""
        rule = lw.DualNormAdaptive()
        made = {
            kind: rule.multipliers(torch.stack(squares).mean(0), size).log().numpy()
            for kind, squares in self.squares.items()
        }
        self.squares = {}
        return made


def measure(name: str, batch: int, moments: list[int]) -> list[str]:
    """Rows of the table for one model and batch size."""
    config = Config.model_validate({"model": name, "training": {"seed": 1, "batch_size": batch}})
    data = TextData(config)
    model = build_model(config.model, Examples(data.vocab_size, config.data.seq_len), 1)
    optimizer = lw.DualMuon(lw.param_groups(model), lr=BASE_RATES[name], momentum_warmup=0, adamw_nu=1.0)
    watched = Watched(model, optimizer)
    sizes = [float(m * n) for p, layout in watched.members for k, m, n in layout.shapes(p.shape) for _ in range(k)]
    rows = []
    for step in range(moments[-1]):
        drawn = data.batch(step)
        loss(model, drawn.inputs, drawn.targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        soon = next(moment for moment in moments if moment > step)
        if step >= soon - WINDOW:
            watched.note()
        watched.keep_gradients()
        for group in optimizer.param_groups:
            group["lr"] = BASE_RATES[name] * config.schedule.factor(step, config.training.steps)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == soon:
            ratio = torch.stack(watched.squares["direction"]).mean(0).sqrt()
            ratio = ratio / torch.stack(watched.squares["direction, exact"]).mean(0).sqrt()
            made = watched.multipliers(torch.tensor(sizes))
            cells = []
            for kind in ("direction", "gradient", "difference"):
                apart = float(np.sqrt(np.mean((made[kind] - made["direction, exact"]) ** 2)))
                alike = float(np.corrcoef(made[kind], made["direction, exact"])[0, 1])
                cells.append(f"{apart:.3f} ({alike:.3f})")
            spread = f"{ratio.min():.2f} to {ratio.max():.2f}"
            rows.append(f"| {name} | {batch} | {soon} | {spread} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--models", default="gpt2-tiny,llama-tiny")
    parser.add_argument("--batches", default="4,16,64", help="sequences of 128 tokens")
    parser.add_argument("--steps", default="20,100", help="moments, ascending")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    moments = [int(step) for step in given.steps.split(",")]
    lines = [
        "# What the dual norms measure",
        "",
        f"`python benchmarks/rate_rule_norms.py --models {given.models} --batches {given.batches} --steps {given.steps}`.",
        "Root mean square of the logarithm of the multipliers' ratio to those of the direction's exact norm, and the",
        "correlation of the logarithms in brackets, over all matrices; means of ten steps; seed 1.",
        "",
        "| model | batch | step | Newton-Schulz's norm over the exact one | direction as the step has it | gradient "
        "| gradient difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in given.models.split(","):
        for batch in given.batches.split(","):
            lines += measure(name, int(batch), moments)
    write_page(given.out / "rate_rule_norms.md", [*lines, "", machine.line()])


if __name__ == "__main__":
    main()
