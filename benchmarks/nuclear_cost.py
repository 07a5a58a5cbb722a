"""What the nuclear norm costs beside the estimate that it replaced, and what that gains.

    python benchmarks/nuclear_cost.py            # two minutes on one core

The estimate up to version 0.1.0 read each matrix three times by eight vectors, took Gauss's and Radau's quadrature and lay
between the two, further up the flatter the spectrum. It is written out here from today's parts. Both take turns in one
thread, processor time of the process. Errors are the largest of four seeds on the spectra of `spectra.py`.
Writes `benchmarks/results/nuclear_cost.md`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import machine
import spectra
from layerwise.common.tensors import largest_entry, or_one
from layerwise.geometry import nuclear_norm, polar
from layerwise.geometry.spectral.lanczos import (
    _bidiagonalise,
    _orthonormal,
    _random_signs,
    exact_polar,
)
from script import RESULTS, documented_parser, write_page

PROBES = 8
SEEDS = 4
#: matrices at once, and their shape
SIZES = [
    (300, 16, 16),
    (48, 64, 64),
    (24, 128, 128),
    (24, 256, 256),
    (12, 384, 384),
    (6, 384, 1536),
    (6, 768, 768),
    (1, 2048, 2048),
]


def earlier(g: Tensor, seed: int = 0) -> Tensor:
    """The estimate of version 0.1.0: exact up to 64 rows, by eight Newton-Schulz steps, else from three readings."""
    largest = or_one(largest_entry(g, (-2, -1)))
    x = g / largest
    x = x if x.size(-2) <= x.size(-1) else x.mT
    n = x.size(-2)
    value = (x * exact_polar(x)).sum((-2, -1)) if n <= 64 else three_readings(x, seed)
    return value * largest[:, 0, 0]


def three_readings(x: Tensor, seed: int) -> Tensor:
    k, n, _ = x.shape
    z = _random_signs(PROBES, n, seed, x).expand(k, PROBES, n)
    start, _ = _orthonormal(z)
    gauss = _bidiagonalise(x, z, 2)
    radau = gauss.clone()
    radau[..., PROBES:] = 0
    both = torch.stack([gauss, radau])
    root = both @ exact_polar(both)[..., :PROBES, :].mT
    square = gauss @ gauss[..., :PROBES, :].mT
    weights = start.mT @ start / PROBES

    def moment(block: Tensor) -> Tensor:
        return (weights * block[..., :PROBES, :]).sum((-2, -1)).to(x.dtype)

    frobenius: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    most = n**0.5 * frobenius
    second, third, fourth = moment(square), moment(square.mT @ root[0]), moment(square.mT @ square)
    surplus = third / or_one(fourth) * (second - frobenius.square())
    upper, lower = moment(root[0]) - surplus, moment(root[1]) - surplus
    value = torch.lerp(lower, upper, 0.3 + 0.7 * (upper / or_one(most)).clamp(0, 1))
    return torch.minimum(torch.maximum(value, frobenius), most)


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def times(shape: tuple[int, int, int], rounds: int) -> list[float]:
    """Medians of a round's seconds: the earlier estimate, today's, and the polar factor of the same matrices."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    calls = [lambda: earlier(g), lambda: nuclear_norm(g), lambda: polar(g)]
    taken = [[seconds(call) for call in calls] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def largest_error(estimate: Callable[[Tensor, int], Tensor], shape: tuple[int, int]) -> float:
    exact = torch.stack([*spectra.closed_forms(min(shape)).values()])
    g = spectra.with_values(exact, shape)
    return max((estimate(g, seed).double() / exact.sum(-1) - 1).abs().max().item() for seed in range(SEEDS))


def row(shape: tuple[int, int, int], rounds: int) -> str:
    before, now, factor = times(shape, rounds)
    cells = [f"{shape[0]} of {shape[1]} x {shape[2]}", f"{now / before:.2f}"]
    cells += [f"{before / factor:.3f}", f"{now / factor:.3f}"]
    if 64 <= min(shape[1:]) <= 768:
        cells.append(f"{largest_error(earlier, shape[1:]):.1%}")
        cells.append(f"{largest_error(lambda g, seed: nuclear_norm(g, seed=seed), shape[1:]):.1%}")
    else:
        cells += ["", ""]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="one size and round, to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes, rounds = ([(3, 80, 80)], 1) if given.small else (SIZES, given.rounds)
    lines = [
        "# What the nuclear norm costs",
        "",
        "`python benchmarks/nuclear_cost.py`: processor time of `nuclear_norm` (`auto`) over that of the estimate up to",
        "version 0.1.0, and of each over the polar factor's of the same matrices (`quintic`, float32); the largest error",
        f"of either on the spectra of `spectra.py`, {SEEDS} seeds.",
        "",
        "| matrices | today's over earlier | earlier over polar | today's over polar | error, earlier | error, today's |",
        "|---|---|---|---|---|---|",
    ]
    for shape in sizes:
        lines.append(row(shape, rounds))
        print(lines[-1], flush=True)
    write_page(given.out / "nuclear_cost.md", [*lines, "", machine.line()])


if __name__ == "__main__":
    main()
