"""Time of one optimizer step, contenders taking turns in one run, on the matrices of real models.

    python benchmarks/optimizer_step.py                                   # d = 384, about three minutes on two cores
    python benchmarks/optimizer_step.py --sets gpt2-small,llama-lora --repeats 3 --warm-up 1
    python benchmarks/optimizer_step.py --device cuda --sets d384,gpt2-small,llama-lora

Writes `benchmarks/results/optimizer_step_DEVICE.{json,md,png}`, or `..._cpu_bfloat16.*` on a processor that has units for
bfloat16 and `..._cpu_amx.*` on one with AMX; sets that were not asked for keep their numbers. On a GPU the iterations run in
bfloat16, launches and peak memory are counted, and dion's Triton and gram-newton-schulz's kernels are compared with every
path of `polar` where they are installed; `gpu_checks.py` has what else is asked of a GPU.
heavyball takes part where it is installed (`pip install -c constraints.txt heavyball`).

Every contender has its own copy of the weights and sees the same two sets of gradients in turn; the order of the
contenders rotates, so that a noisy moment hits all alike. Published codes cast to bfloat16. On a CPU they take part with the
cast taken out ("float32"), and "as shipped" where the processor has units for bfloat16 or `--shipped` asks for it:
without units the cast makes them 28 to 49 times slower.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import layerwise as lw
import literal
import machine
from layerwise.geometry import Spectral, polar
from layerwise.geometry.layout import MatrixLayout
from layerwise.geometry.spectral.newton_schulz import PROCESSOR_UNITS
from layerwise.optim.groups.options import DEFAULTS
from layerwise.optim.rules.noise_adaptive import REFERENCES
from layerwise.optim.work.job import Job, alike
from layerwise.optim.work.local import LocalWork
from script import RESULTS, documented_parser, write_page

Shapes = list[tuple[int, int]]
Step = Callable[[], Any]


def gpt_block(d: int) -> Shapes:
    """As GPT-2 holds them: q, k and v in one."""
    return [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]


def split_block(d: int) -> Shapes:
    """As `param_groups` has them worked on: q, k and v apart."""
    return [(d, d)] * 4 + [(4 * d, d), (d, 4 * d)]


#: q, k, v, o, gate, up, down of TinyLlama's block, and rank-16 adapters on q and v of its 22 layers
LLAMA_BLOCK: Shapes = [
    (2048, 2048),
    (256, 2048),
    (256, 2048),
    (2048, 2048),
    (5632, 2048),
    (5632, 2048),
    (2048, 5632),
]
LORA: Shapes = [(16, 2048), (2048, 16), (16, 2048), (256, 16)] * 22
SETS: dict[str, Shapes] = {
    "tiny": gpt_block(64),  # to try the script
    "tiny-split": split_block(64),
    "d384-block": gpt_block(384),  # for contenders that take a minute a step
    "d384": gpt_block(384) * 12,  # 48 matrices, 190 GFLOP of standard Newton-Schulz
    "d384-split": split_block(384) * 12,
    "gpt2-small": gpt_block(768) * 12,
    "llama-lora": LLAMA_BLOCK + LORA,
}


@dataclass
class Row:
    """One contender on one set: seconds per step, and on a GPU what one step launches and holds at its peak.

    `ratio` to the fastest literal Muon is the median over rounds of the ratio within a round: what slows the machine for
    a while slows both. `low` and `high` are quartiles of the times, `ratio_low` and `ratio_high` of the ratios.
    """

    name: str
    median: float
    low: float
    high: float
    ratio: float = 1.0
    ratio_low: float = 1.0
    ratio_high: float = 1.0
    launches: int | None = None
    peak_mb: float | None = None


def layerwise_groups(params: Sequence[Tensor], precision: str = "auto") -> list[dict[str, Any]]:
    named = [(f"matrix.{i}", p) for i, p in enumerate(params)]
    geometry = Spectral(precision=precision)
    return [{"params": named, "role": "hidden", "layout": MatrixLayout(), "geometry": geometry}]


def torch_muon(params: Sequence[Tensor], cast: bool) -> Step:
    """torch.optim.Muon; without the cast its Newton-Schulz is ours in `literal.py`, which differs in nothing else."""
    from torch.optim import _muon

    optimizer, published = torch.optim.Muon(params, lr=0.02), _muon._zeropower_via_newtonschulz
    if cast:
        return optimizer.step

    def step() -> None:
        _muon._zeropower_via_newtonschulz = lambda g, *_: literal.torch_newton_schulz(g)
        optimizer.step()
        _muon._zeropower_via_newtonschulz = published

    return step


def pytorch_optimizer_step(name: str, params: Sequence[Tensor], cast: bool, **options: Any) -> Step:
    """pytorch-optimizer's Muon or SCION; without the cast its Newton-Schulz is told to work in float32."""
    import pytorch_optimizer

    kind = getattr(pytorch_optimizer, name)
    groups = [{"params": list(params), "use_muon": True}] if name == "Muon" else list(params)
    optimizer = kind(groups, lr=0.02, **options)
    if cast:
        return optimizer.step
    module = sys.modules[kind.__mro__[1].__module__ if name == "Muon" else kind.__module__]
    published = {key: f for key, f in vars(module).items() if key.startswith("zero_power_via")}

    def step() -> None:
        vars(module).update({key: functools.partial(f, dtype=torch.float32) for key, f in published.items()})
        optimizer.step()
        vars(module).update(published)

    return step


def heavyball_muon(params: Sequence[Tensor], cast: bool) -> Step:
    """heavyball's Muon, which compiles itself; without the cast its rounding to bfloat16 is left out for good."""
    import heavyball

    if not cast:
        heavyball.utils.stochastic_round_ = lambda x, source=None: x if source is None else source
    return heavyball.Muon(params, lr=0.02).step


def noise_alone(params: Sequence[Tensor]) -> Step:
    """What LANTON's noise adds to a step: the difference, its dual norms in the optimizer's batches, and the copy."""
    group = DEFAULTS | {"layout": MatrixLayout(), "geometry": Spectral()}
    reference, work = REFERENCES["previous"], LocalWork()
    states = [reference.allocate(p) for p in params]

    def step() -> None:
        jobs = [Job("", p, p, p.grad, True, group, state, 0.02) for p, state in zip(params, states, strict=True)]
        sets = [some.jobs for some in alike(jobs)]
        work.norms([piece for some in sets for piece in lw.DualNorm(reference.difference).asked_of(some)])
        for some in sets:
            lw.NoiseAdaptive().remember(some, None)

    return step


def in_stacks(params: Sequence[Tensor], iterate: Callable[[Tensor], Tensor]) -> Step:
    """`iterate` on one stack for each shape, as its authors call it; copied first, since some work in place."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    return lambda: [iterate(torch.stack([p.grad for p in same])) for same in by_shape.values()]


def dion_polar(params: Sequence[Tensor]) -> Step:
    from dion.newton_schulz_triton import newton_schulz_triton

    return in_stacks(params, newton_schulz_triton)


def gram_polar(params: Sequence[Tensor]) -> Step:
    from gram_newton_schulz import GramNewtonSchulz

    return in_stacks(params, GramNewtonSchulz())


Build = Callable[[Sequence[Tensor]], Step]


def peers(cast: bool, kind: str) -> dict[str, Build]:
    """Other people's optimizers, with their cast to bfloat16 or without."""
    dtype = torch.bfloat16 if cast else torch.float32
    found: dict[str, Build] = {
        f"Muon (torch.optim, {kind})": lambda ps: torch_muon(ps, cast),
        f"Muon (Jordan, literal {kind})": lambda ps: literal.LiteralMuon(ps, dtype=dtype).step,
        f"Scion (literal {kind})": lambda ps: literal.LiteralScion(ps, dtype=dtype).step,
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        found[f"Muon (pytorch-optimizer, {kind})"] = lambda ps: pytorch_optimizer_step("Muon", ps, cast)
        found[f"Muon (pytorch-optimizer, Gram form, {kind})"] = lambda ps: pytorch_optimizer_step(
            "Muon", ps, cast, ns_method="gram_newton_schulz"
        )
        found[f"SCION (pytorch-optimizer, {kind})"] = lambda ps: pytorch_optimizer_step("SCION", ps, cast)
    if importlib.util.find_spec("heavyball"):
        found[f"Muon (heavyball, {kind})"] = lambda ps: heavyball_muon(ps, cast)
    return found


def kernels() -> dict[str, Build]:
    """Newton-Schulz alone on a GPU: other people's kernels, and our paths."""
    found: dict[str, Build] = {}
    if importlib.util.find_spec("dion"):
        found["Newton-Schulz alone (dion, Triton)"] = dion_polar
    if importlib.util.find_spec("gram_newton_schulz"):
        found["Newton-Schulz alone (gram-newton-schulz)"] = gram_polar
    with_triton = ("triton", "triton_gram") if importlib.util.find_spec("triton") else ()
    for path in ("standard", "gram", *with_triton):
        found[f"Newton-Schulz alone (layerwise, {path})"] = lambda ps, path=path: in_stacks(
            ps, functools.partial(polar, path=path)
        )
    return found


def contenders(device: str, shipped: bool) -> dict[str, Build]:
    found: dict[str, Build] = {"AdamW (torch, fused)": lambda ps: torch.optim.AdamW(ps, fused=True).step}
    if device == "cpu":
        found |= peers(cast=False, kind="float32")
    if device != "cpu" or shipped or PROCESSOR_UNITS:
        found |= peers(cast=True, kind="as shipped")
    if device != "cpu":
        found |= kernels()
    elif PROCESSOR_UNITS:
        found["Muon (layerwise, float32)"] = lambda ps: lw.Muon(layerwise_groups(ps, precision="float32"), lr=0.02).step
    return found | {
        "Muon (layerwise)": lambda ps: lw.Muon(layerwise_groups(ps), lr=0.02).step,
        "Lanton without noise (layerwise)": lambda ps: lw.Lanton(layerwise_groups(ps), lr=0.02, rates=None).step,
        "Lanton (layerwise)": lambda ps: lw.Lanton(layerwise_groups(ps), lr=0.02).step,
        "noise alone (layerwise)": noise_alone,
    }


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def kind_of(device: str) -> str:
    """The device, and what a processor multiplies bfloat16 with: results of each kind have files of their own."""
    if device != "cpu" or not PROCESSOR_UNITS:
        return device
    return "cpu_amx" if "amx_bf16" in PROCESSOR_UNITS else "cpu_bfloat16"


def measure(shapes: Shapes, device: str, repeats: int, warm_up: int, only: str, shipped: bool = False) -> list[Row]:
    # A process that has trained has freed blocks of this size, activations. Until one is freed, the C library gives memory
    # back after every batch of any contender, and tens of thousands of page faults a step get it again.
    block = torch.empty(2**25 - 2**16, dtype=torch.uint8)
    del block
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(s, generator=generator).to(device) for s in shapes] for _ in range(2)]
    entries: list[tuple[str, list[Tensor], Step]] = []
    for name, build in contenders(device, shipped).items():
        if only and not any(part in name for part in only.split(",")):
            continue
        params = [torch.nn.Parameter(torch.zeros(s, device=device)) for s in shapes]
        for p, g in zip(params, gradients[0], strict=True):
            p.grad = g
        try:
            entries.append((name, params, build(params)))
        except ImportError as missing:  # installed, but not for this machine
            print(f"{name}: left out, {missing}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in entries}
    for repeat in range(-warm_up, repeats):
        turn = repeat % len(entries)
        for name, params, step in entries[turn:] + entries[:turn]:
            for p, g in zip(params, gradients[repeat % 2], strict=True):
                p.grad = g
            synchronise(device)
            start = time.perf_counter()
            step()
            synchronise(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, _, step in entries:
        low, median, high = quartiles(seconds[name])
        row = Row(name, median, low, high)
        if device == "cuda":
            row.launches, row.peak_mb = launches_and_peak(step)
        rows.append(row)
    base = seconds[fastest_muon(rows).name]
    for row in rows:
        row.ratio_low, row.ratio, row.ratio_high = quartiles([t / b for t, b in zip(seconds[row.name], base, strict=True)])
    return rows


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = statistics.quantiles([*values], n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return low, median, high


def launches_and_peak(step: Step) -> tuple[int, float]:
    """Kernels launched by one step, and how far it raises the allocated memory above where it began."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    kernels = sum(e.count for e in trace.key_averages() if not e.key.startswith(("Memcpy", "Memset", "cuda")))
    return kernels, (torch.cuda.max_memory_allocated() - before) / 2**20


def fastest_muon(rows: list[Row]) -> Row:
    """The fastest Muon that computes the standard iteration as published: what ratios are taken against."""
    literal_ones = [r for r in rows if r.name.startswith("Muon") and "layerwise" not in r.name and "Gram" not in r.name]
    return min(literal_ones, key=lambda r: r.median)


def table(results: dict[str, list[Row]]) -> list[str]:
    lines = ["# Time of an optimizer step", "", "Written by `benchmarks/optimizer_step.py`."]
    lines.append("Machine: " + machine.line("; ", " ") + ".")
    for name, rows in results.items():
        gpu = rows[0].launches is not None
        lines += [
            "",
            f"## {name}: {len(SETS[name])} matrices, {sum(a * b for a, b in SETS[name]) / 1e6:.1f}M entries",
            "",
        ]
        lines.append(
            "| contender | median, ms | quartiles, ms | against the fastest literal Muon | quartiles |"
            + (" launches | peak, MB |" if gpu else "")
        )
        lines.append("|---|---|---|---|---|" + ("---|---|" if gpu else ""))
        for r in rows:
            spread = f"{r.low * 1e3:.1f} to {r.high * 1e3:.1f}"
            ratios = f"{r.ratio:.3f} | {r.ratio_low:.2f} to {r.ratio_high:.2f}"
            line = f"| {r.name} | {r.median * 1e3:.1f} | {spread} | {ratios} |"
            lines.append(line + (f" {r.launches} | {r.peak_mb:.0f} |" if gpu else ""))
    return lines


def figure(results: dict[str, list[Row]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(len(results), 1, figsize=(8, 3.4 * len(results)), squeeze=False, layout="constrained")
    for ax, (name, rows) in zip(axes[:, 0], results.items(), strict=True):
        rows = rows[::-1]
        ratios = [r.ratio for r in rows]
        spread = [
            [r.ratio - r.ratio_low for r in rows],
            [r.ratio_high - r.ratio for r in rows],
        ]
        colours = ["#1f6f8b" if "layerwise" in r.name else "#b8bec4" for r in rows]
        ax.barh([r.name for r in rows], ratios, xerr=spread, color=colours, error_kw={"lw": 0.8, "ecolor": "#444"})
        ax.axvline(1, color="#444", lw=0.8, ls=":")
        ax.set_title(f"{name} ({len(SETS[name])} matrices)")
        ax.set_xlabel("time of a step / fastest literal Muon in the same round (medians and quartiles)")
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--sets", default="d384,d384-split", help=f"comma-separated: {', '.join(SETS)}")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before the clock")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--shipped",
        action="store_true",
        help="on a CPU without bfloat16 units, peers with their cast as well",
    )
    parser.add_argument("--only", default="", help="comma-separated parts of contenders' names")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    unknown = set(args.sets.split(",")) - set(SETS)
    if unknown:
        parser.error(f"--sets {', '.join(sorted(unknown))}: choose from {', '.join(SETS)}")
    info = machine.describe()
    results = {}
    for name in args.sets.split(","):
        results[name] = measure(SETS[name], args.device, args.repeats, args.warm_up, args.only, args.shipped)
        for row in results[name]:
            spread = f"({row.ratio_low:.3f} to {row.ratio_high:.3f})"
            print(f"{name:12s} {row.name:44s} {row.median * 1e3:9.1f} ms  {row.ratio:.3f}  {spread}", flush=True)
    args.out.mkdir(exist_ok=True)
    stem = args.out / f"optimizer_step_{kind_of(args.device)}"
    record = {name: {"repeats": args.repeats, "rows": [asdict(r) for r in v]} for name, v in results.items()}
    old = json.loads(stem.with_suffix(".json").read_text()) if stem.with_suffix(".json").exists() else {}
    if old.get("machine") == info:  # numbers of another machine or version are not mixed with these
        record = old["sets"] | record
    record = {name: record[name] for name in SETS if name in record}
    results = {name: [Row(**row) for row in kept["rows"]] for name, kept in record.items()}
    stem.with_suffix(".json").write_text(json.dumps({"machine": info, "sets": record}, indent=1) + "\n")
    write_page(stem.with_suffix(".md"), table(results))
    figure(results, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
