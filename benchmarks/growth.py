"""How time and memory of a step grow: with width, layers, experts, batch and processes.

    python benchmarks/growth.py            # some minutes on one core

Processor time in one thread of a step of torch's AdamW (foreach), torch's Muon (its cast to bfloat16 taken out, as
processors without units for it take dozens of times as long), our Muon and our Lanton, and the most memory that a step
allocates beside weights, gradients and state. Exponents are slopes in logarithms over the three largest sizes.
Writes `benchmarks/results/growth.md` and `growth.png`.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import layerwise as lw
import machine
from layerwise.geometry.spectral.newton_schulz import PROCESSOR_UNITS
from optimizer_step import torch_muon
from script import RESULTS, documented_parser, write_page

Step = Callable[[], Any]
MIB = 2**20
#: docs/growth.md: what a step may hold beside weights, gradients and state.
LEAST_BYTES, LARGEST_PARAMETERS = (96 if PROCESSOR_UNITS else 48) * MIB, 8


LAYERS_MEMORY = "1, and 0 once batches are full"


class Axis(NamedTuple):
    """What grows, and with which exponents by theory: time of Muon and of AdamW, memory of ours."""

    title: str
    sizes: Sequence[int]
    shapes: Callable[[int], list[tuple[int, ...]]]
    theory: tuple[str, str, str]


def block(width: int) -> list[tuple[int, ...]]:
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


AXES = {
    "width": Axis("width d of one d x d matrix", [128, 256, 512, 1024, 2048], lambda d: [(d, d)], ("3", "2", "2")),
    "layers": Axis(
        "layers of a GPT-2 of width 64",
        [4, 8, 16, 32, 64],
        lambda n: block(64) * n,
        ("1", "1", LAYERS_MEMORY),
    ),
    "experts": Axis("experts, each 64 x 128", [8, 16, 32, 64, 128, 256], lambda n: [(n, 64, 128)], ("1", "1", "1")),
}
CONTENDERS = ("AdamW (torch, foreach)", "Muon (torch, float32)", "Muon (layerwise)", "Lanton (layerwise)")


def made(name: str, params: list[nn.Parameter]) -> Step:
    if name == "AdamW (torch, foreach)":
        return torch.optim.AdamW(params, foreach=True).step
    if name == "Muon (torch, float32)":
        return torch_muon(params, cast=False)
    group = {"role": "hidden", "geometry": lw.Spectral()}
    layout = lw.StackLayout() if params[0].ndim == 3 else lw.MatrixLayout()
    named = [(f"matrix.{i}", p) for i, p in enumerate(params)]
    kind = lw.Muon if name == "Muon (layerwise)" else lw.Lanton
    return kind([{"params": named, "layout": layout, **group}]).step


def parameters(name: str, shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    """torch's Muon takes matrices alone: it gets experts one by one."""
    generator = torch.Generator().manual_seed(0)
    alone = name == "Muon (torch, float32)"
    sizes = [shape[1:] for shape in shapes for _ in range(shape[0])] if alone and len(shapes[0]) == 3 else shapes
    params = [nn.Parameter(torch.zeros(size)) for size in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def seconds(step: Step, least: float = 0.2, most: int = 9) -> float:
    """Median processor time of a step: of as many as fill `least` seconds, two at least."""
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken) < least and len(taken) < most):
        started = time.process_time()
        step()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def peak_bytes(step: Step) -> int:
    """The most that one step has allocated at once, above where it began."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    held = most = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


class Point(NamedTuple):
    seconds: float
    peak: int
    bound: int


def measure(axis: Axis) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {name: [] for name in CONTENDERS}
    for size in axis.sizes:
        shapes = axis.shapes(size)
        bound = max(LEAST_BYTES, LARGEST_PARAMETERS * 4 * max(math.prod(shape) for shape in shapes))
        for name in CONTENDERS:
            step = made(name, parameters(name, shapes))
            step()  # Lanton's first has no noise to measure
            peak = peak_bytes(step)
            found[name].append(Point(seconds(step), peak, bound))
        print(axis.title, size, {name: found[name][-1] for name in CONTENDERS}, flush=True)
    return found


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    x, y = ([math.log(max(v, 1e-12)) for v in row[-3:]] for row in (sizes, values))
    return statistics.linear_regression(x, y).slope


def axis_table(axis: Axis, found: dict[str, list[Point]]) -> list[str]:
    sizes = " | ".join(map(str, axis.sizes))
    lines = [
        f"## With the {axis.title}",
        "",
        f"Time, over that of AdamW at {axis.sizes[0]}; by theory Muon's exponent is {axis.theory[0]}, "
        f"AdamW's {axis.theory[1]}.",
        "",
        f"| optimizer | {sizes} | exponent |",
        "|---|" + "---|" * (len(axis.sizes) + 1),
    ]
    base = found[CONTENDERS[0]][0].seconds
    for name, points in found.items():
        row = " | ".join(f"{p.seconds / base:.3g}" for p in points)
        lines.append(f"| {name} | {row} | {exponent(axis.sizes, [p.seconds for p in points]):.2f} |")
    lines += [
        "",
        f"Most memory beside weights, gradients and state, MiB; by theory ours has exponent {axis.theory[2]}.",
        "",
        f"| optimizer | {sizes} | exponent | most of the bound |",
        "|---|" + "---|" * (len(axis.sizes) + 2),
    ]
    for name, points in found.items():
        row = " | ".join(f"{p.peak / MIB:.3g}" for p in points)
        share = f"{max(p.peak / p.bound for p in points):.2f}" if "layerwise" in name else ""
        lines.append(f"| {name} | {row} | {exponent(axis.sizes, [p.peak for p in points]):.2f} | {share} |")
    return [*lines, ""]


def shares_by_batch(batches: Sequence[int]) -> list[str]:
    """The part of a training step that the optimizer takes, in a small transformer with batches of 64 tokens each."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
    shares: dict[str, list[float]] = {}
    for name in ("AdamW (torch, foreach)", "Muon (layerwise)", "Lanton (layerwise)"):
        model = nn.Sequential(
            nn.Embedding(256, 128),
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(128, 256),
        )
        if name == "AdamW (torch, foreach)":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        else:
            kind = lw.Muon if name == "Muon (layerwise)" else lw.Lanton
            optimizer = kind(lw.param_groups(model))
        shares[name] = []
        for batch in batches:
            tokens = torch.randint(0, 256, (batch, 64))

            def backward(model: nn.Module = model, tokens: Tensor = tokens) -> None:
                model.zero_grad()
                nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()

            backward()
            optimizer.step()
            rest, own = seconds(backward), seconds(optimizer.step)
            shares[name].append(own / (own + rest))
        print(name, shares[name], flush=True)
    lines = [
        "## With the batch: the share of a training step",
        "",
        "Two layers of width 128, sequences of 64 tokens. By theory the share falls like 1 / batch once it is small.",
        "",
        f"| optimizer | {' | '.join(map(str, batches))} | exponent |",
        "|---|" + "---|" * (len(batches) + 1),
    ]
    for name, row in shares.items():
        cells = " | ".join(f"{share:.1%}" for share in row)
        lines.append(f"| {name} | {cells} | {exponent(batches, row):.2f} |")
    return [*lines, ""]


def one_process(rank: int, count: int, folder: str, shapes: list[tuple[int, ...]]) -> None:
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    taken = {}
    for name in ("Muon (layerwise)", "Lanton (layerwise)"):
        step = made(name, parameters(name, shapes))
        step()
        taken[name] = [_timed(step) for _ in range(5)]  # as many on every process: they meet in each step
    torch.save({name: statistics.median(row) for name, row in taken.items()}, f"{folder}/{rank}.pt")
    if count > 1:
        dist.destroy_process_group()


def _timed(step: Step) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def by_processes(counts: Sequence[int], shapes: list[tuple[int, ...]]) -> list[str]:
    """Processor time of the busiest process, the matrices shared out under data parallelism."""
    busiest: dict[str, list[float]] = {}
    torch.multiprocessing.set_forkserver_preload(["layerwise.optim", "layerwise.geometry", "torch.distributed"])
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (count, folder, shapes)
            torch.multiprocessing.start_processes(one_process, arguments, nprocs=count, start_method="forkserver")
            found = [torch.load(f"{folder}/{rank}.pt") for rank in range(count)]
        for name in found[0]:
            busiest.setdefault(name, []).append(max(times[name] for times in found))
        print(count, busiest, flush=True)
    lines = [
        "## With processes, data parallel",
        "",
        f"Processor time of the busiest process over that of one alone, {len(shapes)} matrices of a GPT-2 of width "
        f"{shapes[1][0]}.",
        "By theory products fall like 1 / processes; sending unit steps grows towards one copy of the weights.",
        "",
        f"| optimizer | {' | '.join(map(str, counts))} | exponent |",
        "|---|" + "---|" * (len(counts) + 1),
    ]
    for name, row in busiest.items():
        slope = math.log(row[-1] / row[0]) / math.log(counts[-1] / counts[0])
        lines.append(f"| {name} | {' | '.join(f'{t / row[0]:.2f}' for t in row)} | {slope:.2f} |")
    return [*lines, ""]


def figure(found: dict[str, dict[str, list[Point]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, len(found), figsize=(4 * len(found), 6), layout="constrained", squeeze=False)
    colours = ("#b8bec4", "#8a8f98", "#1f6f8b", "#c8553d")
    for column, (key, points) in enumerate(found.items()):
        sizes = AXES[key].sizes
        for colour, (name, row) in zip(colours, points.items(), strict=True):
            axes[0, column].loglog(sizes, [1e3 * p.seconds for p in row], "o-", color=colour, label=name)
            axes[1, column].loglog(sizes, [p.peak / MIB for p in row], "o-", color=colour)
        axes[1, column].loglog(sizes, [p.bound / MIB for p in row], ":", color="#444", label="bound of ours")
        axes[1, column].set_xlabel(AXES[key].title)
        for ax in axes[:, column]:
            ax.set_xticks(sizes, [str(size) for size in sizes])
            ax.minorticks_off()
    axes[0, 0].set_ylabel("processor time of a step, ms")
    axes[1, 0].set_ylabel("memory beside weights,\ngradients and state, MiB")
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].legend(fontsize=7)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--small", action="store_true", help="two sizes each, to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    batches, counts, shapes = [1, 2, 4, 8, 16], [1, 2, 4], block(128) * 8
    if given.small:
        for key, axis in AXES.items():
            AXES[key] = axis._replace(sizes=[s // 4 for s in axis.sizes[:2]])
        batches, counts, shapes = [1, 2], [1, 2], block(16)
    found = {key: measure(axis) for key, axis in AXES.items()}
    lines = [
        "# Growth of time and memory",
        "",
        "Written by `benchmarks/growth.py`, which says what is measured.",
        "",
        *[line for key, axis in AXES.items() for line in axis_table(axis, found[key])],
        *shares_by_batch(batches),
        *by_processes(counts, shapes),
        machine.line(),
    ]
    write_page(given.out / "growth.md", lines)
    figure(found, given.out / "growth.png")
    for points in found.values():
        for name in ("Muon (layerwise)", "Lanton (layerwise)"):
            assert all(p.peak <= p.bound for p in points[name]), f"{name} holds more than docs/growth.md says"


if __name__ == "__main__":
    main()
