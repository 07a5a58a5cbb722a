"""The rounding error of each way to compute a polar factor, in float32 and in half precision.

    python benchmarks/polar_errors.py            # about five minutes on two cores

Every path of `polar` against the same polynomials in float64: the largest singular value of the difference (those of the
factor itself are near 1). Where there are units for it that is bfloat16, on a GPU's Gram paths float16; any CPU computes
the same numbers, products summed in float32 and rounded, a few dozen times slower. Ways that are not offered are
there for comparison. Writes `benchmarks/results/polar_errors.md`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import literal
import machine
from layerwise.geometry import polar
from layerwise.geometry.spectral.newton_schulz import POLYNOMIALS, RESTART_AFTER, newton_schulz, normalised_in
from noise_estimates import corpus, hidden_gradients
from script import RESULTS, documented_parser, write_page

#: What Muon uses, and the steepest.
METHODS = ("quintic", "polar_express")
Product = Callable[[Tensor, Tensor], Tensor]
Compute = Callable[[Tensor], Tensor]


def momentum_matrices(width: int, steps: int) -> list[Tensor]:
    """Muon's momentum (0.95) of every hidden matrix of a three-layer GPT-2 that learns the standard library."""
    torch.manual_seed(0)
    data = corpus()
    shape = {"vocab_size": 256, "n_positions": 128, "n_embd": width, "n_layer": 3, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
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


def by_path(method: str, path: str, dtype: torch.dtype) -> Compute:
    """What Newton-Schulz computes on a path; bfloat16 as a GPU with units for it does."""

    def compute(g: Tensor) -> Tensor:
        wide = g.size(0) <= g.size(1)
        x = normalised_in((g if wide else g.T).unsqueeze(0), dtype)
        factor = newton_schulz(x, POLYNOMIALS[method], path)[0]
        return factor if wide else factor.T

    return compute


def rounded(a: Tensor, b: Tensor) -> Tensor:
    """Factors in bfloat16, sums and result in float32: what `torch.set_float32_matmul_precision("medium")` asks for."""
    return a.bfloat16().float() @ b.bfloat16().float()


def split(a: Tensor, b: Tensor) -> Tensor:
    """Both factors as a sum of two bfloat16 numbers: three products, sums in float32. 16 bits instead of 8."""
    a_high, b_high = a.bfloat16().float(), b.bfloat16().float()
    a_low, b_low = (a - a_high).bfloat16().float(), (b - b_high).bfloat16().float()
    return a_high @ b_high + (a_high @ b_low + a_low @ b_high)


def standard_by(method: str, product: Product) -> Compute:
    """The standard iteration in float32, its products by `product`."""

    def compute(g: Tensor) -> Tensor:
        x = normalised_in(g if g.size(0) <= g.size(1) else g.T, torch.float32)
        for a, b, c in POLYNOMIALS[method]:
            gram = product(x, x.T)
            x = a * x + product(b * gram + c * product(gram, gram), x)
        return x if g.size(0) <= g.size(1) else x.T

    return compute


def gram_by(method: str, product: Product) -> Compute:
    """The Gram form in float32 with the restart of `newton_schulz`, its products by `product`."""

    def compute(g: Tensor) -> Tensor:
        x = normalised_in(g if g.size(0) <= g.size(1) else g.T, torch.float32)
        identity = torch.eye(x.size(0))
        for triples in (POLYNOMIALS[method][:RESTART_AFTER], POLYNOMIALS[method][RESTART_AFTER:]):
            gram, q = product(x, x.T), identity
            for a, b, c in triples:
                p = a * identity + b * gram + c * product(gram, gram)
                q = p if q is identity else product(q, p)
                gram = product(product(gram, p), p)
            x = product(q, x)
        return x if g.size(0) <= g.size(1) else x.T

    return compute


def largest_error(compute: Compute, method: str, kind: list[Tensor]) -> float:
    return max(torch.linalg.matrix_norm(compute(g).double() - polar(g.double(), method), ord=2).item() for g in kind)


def ways(method: str) -> dict[str, Compute]:
    """Row of the table to how it is computed."""
    published: dict[str, Compute] = {
        f"as published (Jordan), {name}": lambda g, dtype=dtype: literal.jordan_newton_schulz(g, dtype)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    return (published if method == "quintic" else {}) | {
        "`standard`, float32": by_path(method, "standard", torch.float32),
        "`gram`, float32": by_path(method, "gram", torch.float32),
        "`standard`, bfloat16 (a GPU)": by_path(method, "standard", torch.bfloat16),
        "`gram`, float16 (a GPU, by name)": by_path(method, "gram", torch.float16),
        "shifted squares, bfloat16 (a processor)": lambda g: polar(g, method, path="standard", precision="bfloat16"),
        "the same in pairs (a processor, m >= 1.5 n)": lambda g: polar(g, method, path="gram", precision="bfloat16"),
        "`standard`, factors in bfloat16, sums in float32 (not offered)": standard_by(method, rounded),
        "`gram`, factors in bfloat16, sums in float32 (not offered)": gram_by(method, rounded),
        "`gram`, factors split in two, sums in float32 (not offered)": gram_by(method, split),
    }


def table(kinds: dict[str, list[Tensor]]) -> list[str]:
    lines = [f"| method | path and precision | {' | '.join(kinds)} |", "|---|---|" + "---|" * len(kinds)]
    for method in METHODS:
        for way, compute in ways(method).items():
            errors = [largest_error(compute, method, kind) for kind in kinds.values()]
            lines.append(f"| {method} | {way} | {' | '.join(f'{e:.1e}' for e in errors)} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    lines = [
        "# Rounding errors of polar factors",
        "",
        f"Written by `benchmarks/polar_errors.py`: matrices of {args.width} x {args.width} and {args.width} x "
        f"{4 * args.width}, and the momentum of a three-layer GPT-2 of that width after {args.steps} steps; "
        "the largest error in the spectral norm against the same polynomials in float64.",
        "Machine: " + machine.line("; ", " ") + ".",
        "",
        *table(matrices(args.width, args.steps)),
    ]
    write_page(RESULTS / "polar_errors.md", lines)


if __name__ == "__main__":
    main()
