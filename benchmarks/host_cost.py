"""What a step costs beside its arithmetic: many small parameters, as LoRA, experts and vision models have.

    python benchmarks/host_cost.py            # about two minutes on one core

Pairs of a 16 x 16 weight and a bias, with new gradients at every step (of a gradient like the last one there is no noise to
measure). Processor time of a step of each optimizer over that of torch's AdamW with `foreach`, all in one process and
thread, taking turns; and the operations that a step asks torch for, one on a list of
tensors counted as one, views not counted (a test holds them to bounds). Writes `benchmarks/results/host_cost.md`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise as lw
import machine
from script import RESULTS, documented_parser, write_page

Step = Callable[[], Any]


def torch_muon(model: nn.Module) -> Step:
    """torch.optim.Muon for the matrices, without its cast to bfloat16 it would be slower still; AdamW for the rest."""
    muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2])
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], foreach=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


CONTENDERS: dict[str, Callable[[nn.Module], Step]] = {
    "AdamW (torch, foreach)": lambda model: torch.optim.AdamW(model.parameters(), foreach=True).step,
    "AdamW (torch, fused)": lambda model: torch.optim.AdamW(model.parameters(), fused=True).step,
    "Muon (torch) and AdamW (torch, foreach)": torch_muon,
    "Muon (layerwise)": lambda model: lw.Muon(lw.param_groups(model)).step,
    "DualMuon (layerwise)": lambda model: lw.DualMuon(lw.param_groups(model)).step,
    "Scion (layerwise)": lambda model: lw.Scion(lw.param_groups(model)).step,
    "Lanton (layerwise)": lambda model: lw.Lanton(lw.param_groups(model)).step,
}


class Launches(TorchDispatchMode):
    """Operations asked for, but for views and for reading a number that lies on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        views = [r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns]
        asks = function.namespace != "aten" or function._opname in ("_local_scalar_dense", "promote_types")
        if not asks and not (views and all(views)):
            self.count += 1
        return function(*args, **(kwargs or {}))


def layers(pairs: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(16, 16) for _ in range(pairs)])
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def new_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.normal_()


def seconds(rounds: int, pairs: int) -> dict[str, list[float]]:
    """Of a step of each contender in every round; the order turns."""
    models = {name: layers(pairs) for name in CONTENDERS}
    steps = {name: build(models[name]) for name, build in CONTENDERS.items()}
    names = [*steps]
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-2, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            new_gradients(models[name])
            started = time.process_time()
            steps[name]()
            if number >= 0:
                taken[name].append(time.process_time() - started)
    return taken


def launches(build: Callable[[nn.Module], Step], pairs: int) -> int:
    step = build(layers(pairs))
    for _ in range(2):
        step()
    with Launches() as seen:
        step()
    return seen.count


def table(pairs: int, rounds: int, counts: list[int]) -> list[str]:
    taken = seconds(rounds, pairs)
    base, muon = taken["AdamW (torch, foreach)"], taken["Muon (layerwise)"]
    lines = [
        f"| optimizer | of AdamW's time (quartiles) | of our Muon's | launches, {', '.join(map(str, counts))} pairs |",
        "|---|---|---|---|",
    ]
    for name, own in taken.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(own, base, strict=True)], n=4)
        over_muon = statistics.median(a / b for a, b in zip(own, muon, strict=True))
        asked = ", ".join(str(launches(CONTENDERS[name], count)) for count in counts)
        lines.append(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {over_muon:.2f} | {asked} |")
        print(lines[-1], flush=True)
    return [*lines, "", f"AdamW (foreach): {1e3 * statistics.median(base):.1f} ms a step, {pairs} pairs."]


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--small", action="store_true", help="few pairs and rounds, to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pairs, rounds, counts = (4, 3, [2, 4]) if given.small else (300, given.rounds, [10, 100, 1000])
    lines = [
        "# Host cost of a step",
        "",
        f"`python benchmarks/host_cost.py`: {pairs} pairs of a 16 x 16 weight and a bias, new gradients at every step,",
        f"processor time in one thread, {rounds} rounds taking turns.",
        "",
        *table(pairs, rounds, counts),
        "",
        machine.line(),
    ]
    write_page(given.out / "host_cost.md", lines)


if __name__ == "__main__":
    main()
