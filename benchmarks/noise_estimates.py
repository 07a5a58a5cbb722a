"""The error of each nuclear-norm method on every kind of spectrum, and what it does to LANTON's rates.

    python benchmarks/noise_estimates.py            # about ten minutes on two cores
    python benchmarks/noise_estimates.py --record   # the singular values of `tests/data/gradient_differences.json` as well

Three tables: the spectra of `spectra.py` at several sizes; the gradient differences of a small GPT-2, which learns the
standard library's source byte by byte, at its 1st, 10th, 100th and 1000th step; and what the errors do to LANTON's rates
in 60 steps of it: H is a moving average of the squares, and a unit's multiplier `(H_min / H)^(1/4)`.
Writes `benchmarks/results/noise_estimates.md`.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import machine
import spectra
from layerwise.geometry import nuclear_norm, polar
from layerwise.geometry.spectral.lanczos import _bidiagonalise, _random_signs, _roots, steps_for
from script import RESULTS, documented_parser, write_page

BETA = 0.95
SETTLED = 20  # steps after which the moving average is looked at
SEEDS = 20
Method = Callable[[Tensor, int], Tensor]


def quintic(g: Tensor) -> Tensor:
    """What a second Newton-Schulz of the usual kind would give."""
    return (g * polar(g, "quintic")).sum((-2, -1))


def gauss_alone(g: Tensor, seed: int) -> Tensor:
    """The quadrature that `lanczos` starts from: the same probes and readings, and none of its two remedies."""
    x = (g if g.size(-2) <= g.size(-1) else g.mT).reshape(-1, min(g.shape[-2:]), max(g.shape[-2:]))
    n, p = x.size(-2), 8
    z = _random_signs(p, n, seed, x).expand(x.size(0), p, n)
    _, traces = _roots(_bidiagonalise(x, z, steps_for(n)), p)
    return (traces[0] * n / p).reshape(g.shape[:-2])


ESTIMATES: dict[str, Method] = {
    "lanczos (auto)": lambda d, t: nuclear_norm(d, "lanczos", seed=t),
    "Gauss's rule alone": gauss_alone,
}
METHODS: dict[str, Method] = {
    "svd (float64)": lambda d, _: torch.linalg.svdvals(d.double()).sum(-1),
    "gram": lambda d, _: nuclear_norm(d, "gram"),
    "polar": lambda d, _: nuclear_norm(d, "polar"),
    "<G, quintic(G)>": lambda d, _: quintic(d),
    **ESTIMATES,
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


def differences(width: int, layers: int, steps: int) -> Iterator[dict[str, Tensor]]:
    """Every hidden matrix's gradient difference at step 1, 2, ... of AdamW on batches of 1024 bytes."""
    torch.manual_seed(0)
    data = corpus()
    shape = {"vocab_size": 256, "n_positions": 128, "n_embd": width, "n_layer": layers, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    previous: dict[str, Tensor] = {}
    for _ in range(steps + 1):
        starts = torch.randint(0, len(data) - 128, (8,)).tolist()
        batch = torch.stack([data[i : i + 128] for i in starts])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        gradients = hidden_gradients(model)
        if previous:
            yield {unit: g - previous[unit] for unit, g in gradients.items()}
        previous = gradients
        optimizer.step()


def errors_by_spectrum(sizes: list[tuple[int, int]]) -> list[str]:
    """The largest error of any seed for each kind of spectrum, and of which one."""
    lines = [
        "| shape | readings | largest error on any spectrum and seed | mean error on it | median of all "
        "| Gauss's rule alone: largest, median |",
        "|---|---|---|---|---|---|",
    ]
    for shape in sizes:
        values = spectra.closed_forms(min(shape))
        exact = torch.stack([*values.values()])
        g = spectra.with_values(exact, shape)
        found = {
            name: torch.stack([method(g, seed).double() for seed in range(SEEDS)]) / exact.sum(-1) - 1
            for name, method in ESTIMATES.items()
        }
        mine, plain = found.values()
        worst = int(mine.abs().amax(0).argmax())
        lines.append(
            f"| {shape[0]} x {shape[1]} | {2 * steps_for(min(shape)) - 1} | {mine.abs().max():.1%} (`{[*values][worst]}`) "
            f"| {mine[:, worst].mean():+.1%} | {mine.abs().median():.1%} "
            f"| {plain.abs().max():.0%}, {plain.abs().median():.1%} |"
        )
        print(lines[-1], flush=True)
    return [*lines, "", f"{len(values)} spectra, {SEEDS} seeds each; which: `benchmarks/spectra.py`."]


def errors_by_step(width: int, layers: int, marks: list[int], record: dict[str, dict[str, list[float]]]) -> list[str]:
    """Rows of the second table. Singular values of the last layer's q, v, up and down go into the record."""
    lines = []
    last = f".h.{layers - 1}."
    kept = (f"{last}attn.c_attn.weight[0]", f"{last}attn.c_attn.weight[2]", f"{last}mlp.")
    for step, found in enumerate(differences(width, layers, max(marks)), start=1):
        if step not in marks:
            continue
        errors: dict[str, list[Tensor]] = {name: [] for name in ESTIMATES}
        for unit, d in found.items():
            values = torch.linalg.svdvals(d.double())
            if any(part in unit for part in kept):
                name = f"{unit.removeprefix('transformer.h.')}, step {step}"
                record.setdefault(str(width), {})[name] = [float(f"{v:.4g}") for v in values.tolist()]
            for name, method in ESTIMATES.items():
                errors[name] += [method(d, seed).double() / values.sum() - 1 for seed in range(SEEDS)]
        mine, plain = (torch.stack(e) for e in errors.values())
        lines.append(
            f"| {width} | {step} | {mine.mean():+.1%}, {mine.std():.1%}, {mine.abs().max():.1%} "
            f"| {plain.mean():+.1%}, {plain.std():.1%}, {plain.abs().max():.1%} |"
        )
        print(lines[-1], flush=True)
    return lines


def trajectories(width: int, layers: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """For each method and step, the nuclear norm of every unit's gradient difference."""
    values: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for step, found in enumerate(differences(width, layers, steps - 1), start=1):
        for name, method in METHODS.items():
            values[name].append({unit: method(d, step).item() for unit, d in found.items()})
    return values


def multipliers(series: list[dict[str, float]]) -> Tensor:
    """`(H_min / H)^(1/4)` of every unit at every settled step, `[steps, units]`."""
    squares = torch.tensor([list(row.values()) for row in series], dtype=torch.float64).square()
    averages = [squares[0]]
    for row in squares[1:]:
        averages.append(BETA * averages[-1] + (1 - BETA) * row)
    h = torch.stack(averages)[SETTLED:]
    return (h.amin(-1, keepdim=True) / h) ** 0.25


def errors_of_rates(values: dict[str, list[dict[str, float]]]) -> list[str]:
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
    return [*lines, "", f"Exact multipliers range from {right.min():.2f} to 1 (mean {right.mean():.2f})."]


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--width", type=int, default=192, help="of the GPT-2 whose rates are looked at")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--record", action="store_true", help="write the singular values that the tests use")
    parser.add_argument("--small", action="store_true", help="few sizes and steps, to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    sizes = [(96, 96), (384, 96), (192, 192), (256, 1024), (384, 384), (1536, 384), (768, 768)]
    runs = {128: [1, 10, 100, 1000], 384: [1, 10, 100], 768: [1, 10]}
    if args.small:
        sizes, runs, args.width, args.layers, args.steps = [(65, 65)], {72: [1, 3]}, 72, 1, SETTLED + 2
    record: dict[str, dict[str, list[float]]] = {}
    lines = [
        "# Errors of nuclear norms",
        "",
        "Written by `benchmarks/noise_estimates.py`; all against a float64 SVD.",
        "Machine: " + machine.line("; ", " ") + ".",
        "",
        "## Every kind of spectrum",
        "",
        *errors_by_spectrum(sizes),
        "",
        "## Gradient differences of a GPT-2",
        "",
        "Every hidden matrix of three layers (q, k and v apart), batches of 1024 bytes, AdamW, "
        f"{SEEDS} seeds each. Errors: mean, deviation, largest.",
        "",
        "| width | step | lanczos (auto) | Gauss's rule alone |",
        "|---|---|---|---|",
        *[line for width, marks in runs.items() for line in errors_by_step(width, args.layers, marks, record)],
        "",
        "## LANTON's rates",
        "",
        f"The same model with {args.layers} layers of width {args.width}, {args.steps} steps, a seed each.",
        "",
        *errors_of_rates(trajectories(args.width, args.layers, args.steps)),
    ]
    write_page(args.out / "noise_estimates.md", lines)
    print("\n".join(lines))
    if args.record:
        spectra.RECORDED.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
