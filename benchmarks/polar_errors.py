"""The rounding error of each way to compute a polar factor, in float32 and as a GPU computes.

    python benchmarks/polar_errors.py            # about five minutes on two cores

Every path of `polar` against the same polynomials in float64: the largest singular value of the difference (those of the
factor itself are near 1). A GPU computes in bfloat16, on the Gram paths in float16; here a CPU does the same, products
summed in float32 and rounded, a few dozen times slower. Writes `benchmarks/results/polar_errors.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import literal
import machine
from layerwise.geometry import polar
from layerwise.geometry.spectral.newton_schulz import POLYNOMIALS, newton_schulz
from layerwise.geometry.spectral.polar import _normalised_in
from noise_estimates import corpus, hidden_gradients

RESULTS = Path(__file__).parent / "results"
#: What Muon uses, and the steepest.
METHODS = ("quintic", "polar_express")
PATHS = ("standard", "gram", "gram in bfloat16")
DTYPES = {"float32": torch.float32, "on a GPU": torch.bfloat16}


def momentum_matrices(width: int, steps: int) -> list[Tensor]:
    """Muon's momentum (0.95) of every hidden matrix of a three-layer GPT-2 that learns the standard library."""
    torch.manual_seed(0)
    data = corpus()
    shape = {"vocab_size": 256, "n_positions": 128, "n_embd": width, "n_layer": 3, "n_head": 4}
    model = GPT2LMHeadModel(
        GPT2Config(**shape, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    momentum: dict[str, Tensor] = {}
    for _ in range(steps):
        starts = torch.randint(0, len(data) - 128, (8,)).tolist()
        batch = torch.stack([data[i : i + 128] for i in starts])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        for name, g in hidden_gradients(model).items():
            momentum[name] = momentum[name].lerp(g, 0.05) if name in momentum else g * 0.05
        optimizer.step()
    return list(momentum.values())


def matrices(width: int, steps: int) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    white = [torch.randn(width, m, generator=generator) for m in (width, 4 * width)]
    steep = []
    for w in white:
        u, values, vh = torch.linalg.svd(w.double(), full_matrices=False)
        decay = torch.arange(1, values.size(-1) + 1, dtype=torch.float64) ** -2.0
        steep.append(((u * decay) @ vh).float())
    return {
        "white noise": white,
        "singular values 1 / i^2": steep,
        "momentum": momentum_matrices(width, steps),
    }


def by_path(method: str, path: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def compute(g: Tensor) -> Tensor:
        wide = g.size(0) <= g.size(1)
        kind, *forced = path.split(" in ")
        x = _normalised_in((g if wide else g.T).unsqueeze(0), dtype, "" if forced else kind)
        factor = newton_schulz(x, POLYNOMIALS[method], kind)[0]
        return factor if wide else factor.T

    return compute


def largest_error(compute: Callable[[Tensor], Tensor], method: str, kind: list[Tensor]) -> float:
    return max(
        torch.linalg.matrix_norm(compute(g).double() - polar(g.double(), method), ord=2).item() for g in kind
    )


def table(kinds: dict[str, list[Tensor]]) -> list[str]:
    lines = [
        f"| method | path | {' | '.join(f'{kind}, {dtype}' for dtype in DTYPES for kind in kinds)} |",
        "|---|---|" + "---|" * (len(kinds) * len(DTYPES)),
    ]
    rows: list[tuple[str, str, Callable[[torch.dtype], Callable[[Tensor], Tensor]]]] = [
        (method, path, lambda dtype, method=method, path=path: by_path(method, path, dtype))
        for method in METHODS
        for path in PATHS
    ]
    published = lambda dtype: lambda g: literal.jordan_newton_schulz(g, dtype)  # noqa: E731
    rows.insert(0, ("quintic", "as published (Jordan)", published))
    for method, path, computer in rows:
        errors = [
            largest_error(computer(dtype), method, kind)
            for dtype in DTYPES.values()
            for kind in kinds.values()
        ]
        lines.append(f"| {method} | {path} | {' | '.join(f'{e:.1e}' for e in errors)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    lines = [
        "# Rounding errors of polar factors",
        "",
        f"Written by `benchmarks/polar_errors.py`: matrices of {args.width} x {args.width} and {args.width} x "
        f"{4 * args.width}, and the momentum of a three-layer GPT-2 of that width after {args.steps} steps; "
        "the largest error in the spectral norm against the same polynomials in float64.",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine.describe().items()) + ".",
        "",
        *table(matrices(args.width, args.steps)),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "polar_errors.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
