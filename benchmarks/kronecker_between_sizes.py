"""Do the errors of an estimator cancel between a small model and a large one? docs/function-space.md says.

    python benchmarks/kronecker_between_sizes.py      # a few minutes of CPU time

FLeRM multiplies a rate by `base / measured`, so an estimator may be off by a factor as long as it is the same factor in
both models. For each pair of sizes of the function-space paper's models, after some steps of Adam: by how much the
matched rates of weight matrices differ from those that exact rates give, over tensors and three seeds of the large model
(the base's rates averaged over three seeds too). With 512 probes, so that what is left is mostly bias: the noise of
`full_cov` is 3 % then, and 9 % at the default of 64 probes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwise.function_space import function_space_rates
from layerwise.lab.models.paper import Decoder, ResMLP
from script import RESULTS, documented_parser, write_page

ESTIMATORS = ("kronecker", "full_cov")
SEEDS = (0, 1, 2)
PROBES = 512


@dataclass(frozen=True)
class Case:
    """A pair of sizes: what the models read, how they are made, and after how many steps their rates are taken."""

    title: str
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    small: Callable[[], nn.Module]
    large: Callable[[], nn.Module]
    steps: int


def digits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """64 of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    chosen = torch.randint(len(labels), (64,), generator=generator)
    return images[chosen].float().sub(4.9).div(6.0), labels[chosen]


def text(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """8 x 32 bytes of a file of the standard library, each with the byte after it."""
    data = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    starts = torch.randint(len(data) - 33, (8, 1), generator=generator)
    pieces = data[starts + torch.arange(33)]
    return pieces[:, :-1], pieces[:, 1:]


def resmlp(width: int, blocks: int) -> Callable[[], nn.Module]:
    return lambda: ResMLP(64, 10, base_width=width, base_blocks=4, depth=blocks // 4)


def decoder(width: int) -> Callable[[], nn.Module]:
    return lambda: Decoder(256, norm="pre", base_width=16, base_heads=1, width=width // 16)


CASES = [
    *(Case("ResMLP, 128 x 4 to 256 x 8", digits, resmlp(128, 4), resmlp(256, 8), n) for n in (0, 3, 10)),
    *(Case("ResMLP, 32 x 4 to 512 x 4", digits, resmlp(32, 4), resmlp(512, 4), n) for n in (0, 3)),
    *(Case("PreNorm decoder, 16 to 128", text, decoder(16), decoder(128), n) for n in (0, 3)),
]


def rates_after(case: Case, make: Callable[[], nn.Module], seed: int, lr: float) -> dict[str, dict[str, float]]:
    """`{estimator: {matrix: rate}}` of the step after `case.steps` steps of Adam, `exact` included."""
    torch.manual_seed(seed)
    model, generator = make(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    before: dict[str, Tensor] = {}
    for _ in range(case.steps + 1):
        inputs, targets = case.batch(generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
    update = {name: p.detach() - before[name] for name, p in model.named_parameters() if p.ndim == 2}
    model.load_state_dict(before)
    inputs, _ = case.batch(generator)
    found = {}
    for method in ("exact", *ESTIMATORS):
        rates = function_space_rates(model, update, inputs, method=method, probes=PROBES, seed=seed)
        found[method] = {name: rate.value for name, rate in rates.items()}
    return found


def source(name: str, names: Sequence[str], blocks: int) -> str:
    """The small model's tensor that a large one's takes its rate from: with twice the blocks, of block b // 2."""
    if name in names and blocks == 1:
        return name
    parts = name.split(".")
    return ".".join(str(int(part) // blocks) if part.isdigit() else part for part in parts)


def carried(case: Case, lr: float) -> Mapping[str, list[float]]:
    """`{estimator: matched over exactly matched rate, minus 1}`, over the large model's matrices and seeds."""
    small = [rates_after(case, case.small, seed, lr) for seed in SEEDS]
    base = {method: {name: fmean(one[method][name] for one in small) for name in small[0][method]} for method in small[0]}
    errors: dict[str, list[float]] = {method: [] for method in ESTIMATORS}
    for seed in SEEDS:
        large = rates_after(case, case.large, seed + len(SEEDS), lr)
        ratio = max(1, round(len(large["exact"]) / len(base["exact"])))
        for name, exact in large["exact"].items():
            origin = source(name, list(base["exact"]), ratio)
            for method in ESTIMATORS:
                found = base[method][origin] / large[method][name]
                errors[method].append(found / (base["exact"][origin] / exact) - 1)
    return errors


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's rate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "Made by `python benchmarks/kronecker_between_sizes.py`; docs/function-space.md explains it.",
        "",
        f"| sizes | after steps | {' | '.join(f'{m}: mean, deviation, worst' for m in ESTIMATORS)} |",
        "|---|---:|" + "---:|" * len(ESTIMATORS),
    ]
    for case in CASES:
        cells = []
        for errors in carried(case, options.lr).values():
            worst = max(errors, key=lambda error: abs(math.log1p(error)))
            cells.append(f"{fmean(errors):+.0%}, {pstdev(errors):.0%}, {worst:+.0%}")
        lines.append(f"| {case.title} | {case.steps} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    write_page(RESULTS / "kronecker_between_sizes.md", lines)


if __name__ == "__main__":
    main()
