"""What issue 4 asks of a GPU beside the step's time: host synchronisation, recompilation, batching, paths, noise's share.

    python benchmarks/gpu_checks.py                        # on a GPU: a few minutes; results/gpu_checks_cuda.md
    python benchmarks/gpu_checks.py --device cpu --small   # dry run of the same code: the numbers mean nothing
    python benchmarks/gpu_checks.py --device cpu --only paths   # times by path (docs/polar.md)

Run `optimizer_step.py --device cuda` for times against other libraries. No GPU was at hand when this was written.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

import layerwise as lw
import machine
from layerwise.errors import LayerwiseError
from layerwise.geometry import polar
from layerwise.geometry.spectral.newton_schulz import PATHS
from layerwise.optim import LayerwiseOptimizer
from optimizer_step import SETS, layerwise_groups, synchronise
from script import RESULTS, documented_parser, write_page

PATH_SHAPES = {
    "cpu": [(384, 384), (384, 1536), (768, 768), (768, 3072)],
    "cuda": [(384, 1536), (768, 768), (768, 3072), (2048, 2048), (2048, 5632)],
}
#: Calls that make the host wait for the device, as the profiler names them.
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::_local_scalar_dense",
)


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def optimizer(device: str, shapes: Sequence[tuple[int, int]], **options: object) -> LayerwiseOptimizer:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(s, device=device)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    return lw.Lanton(layerwise_groups(params), **{"lr": 0.02, **options})


def synchronisation(device: str, shapes: Sequence[tuple[int, int]], trace: Path) -> list[str]:
    """A step under torch's own check and under the profiler, whose trace is kept."""
    step = optimizer(device, shapes).step
    for _ in range(3):
        step()
    synchronise(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        step()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchron" in str(w.message)]
    synchronise(device)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=kinds) as trace_of:
        step()
    trace_of.export_chrome_trace(str(trace))
    found = {e.key: e.count for e in trace_of.key_averages() if e.key in WAITS}
    return [f"warnings of torch's sync check: {len(waits)}; calls that wait, by the profiler: {found or 'none'}"]


def recompilation(device: str, shapes: Sequence[tuple[int, int]], backend: str) -> list[str]:
    """Graphs compiled for five steps of a compiled training step whose rate changes each time."""
    torch._dynamo.reset()
    rate = torch.tensor(0.02, device=device)
    model = nn.Sequential(*(nn.Linear(d_in, d_out, bias=False) for d_out, d_in in shapes)).to(device)
    opt = lw.Lanton(lw.param_groups(model), lr=rate)
    counter = CompileCounterWithBackend(backend)

    @torch.compile(backend=counter)
    def train(x: Tensor) -> None:
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad(set_to_none=False)

    counts = []
    for step in range(5):
        rate.fill_(0.02 / (step + 1))
        train(torch.randn(8, shapes[0][1], device=device))
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    return [f"graphs compiled after each of five steps, a new rate each: {counts}"]


def batching(device: str, sizes: Sequence[int], count: int, repeats: int) -> list[str]:
    """A stack of square matrices at once against one by one: where BATCH_BELOW should be."""
    lines = ["| n | one by one, ms | together, ms | ratio |", "|---|---|---|---|"]
    for n in sizes:
        stack = torch.randn(count, n, n, device=device)
        alone = seconds(lambda stack=stack: [polar(x) for x in stack], device, repeats)
        together = seconds(lambda stack=stack: polar(stack), device, repeats)
        lines.append(f"| {n} | {alone * 1e3:.2f} | {together * 1e3:.2f} | {together / alone:.2f} |")
    return lines


def paths(device: str, shapes: Sequence[tuple[int, int]], repeats: int) -> list[str]:
    """Every path of `polar` on four matrices, taking turns, and its error against the same polynomials in float64.

    Half of the matrices have singular values 1 / i^2: those that rounding touches most.
    """
    lines = ["| shape | path | ms | against standard | error in the spectral norm |", "|---|---|---|---|---|"]
    for shape in shapes:
        stack = torch.randn(4, *shape, device=device)
        u, values, vh = torch.linalg.svd(stack[:2], full_matrices=False)
        stack[:2] = (u * torch.arange(1, values.size(-1) + 1, device=device) ** -2.0) @ vh
        truth = polar(stack.double())
        taken: dict[str, list[float]] = {}
        for path in PATHS[1:] * (repeats + 1):
            with contextlib.suppress(LayerwiseError):  # a path that this device does not have
                taken.setdefault(path, []).append(seconds(lambda x=stack, p=path: polar(x, path=p), device, 1))
        medians = {path: statistics.median(times) for path, times in taken.items() if times}
        for path in PATHS[1:]:
            name = f"{shape[0]} x {shape[1]} | {path}"
            if path not in medians:
                lines.append(f"| {name} | not on this machine | | |")
                continue
            error = torch.linalg.matrix_norm(polar(stack, path=path).double() - truth, ord=2).max()
            ratio = medians[path] / medians["standard"]
            lines.append(f"| {name} | {medians[path] * 1e3:.2f} | {ratio:.2f} | {error:.1e} |")
    return lines


def noise_share(device: str, small: bool, repeats: int) -> list[str]:
    """LANTON's noise as a share of its step and of a GPT-2 training step (8 x 1024 tokens, bfloat16 autocast)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 256, "n_positions": 64} if small else {}
    model = GPT2LMHeadModel(GPT2Config(**size)).to(device)
    tokens = torch.randint(0, model.config.vocab_size, (8, model.config.n_positions), device=device)
    plain = lw.Lanton(lw.param_groups(model), lr=1e-4, rates=None)
    noisy = lw.Lanton(lw.param_groups(model), lr=1e-4)

    def gradients() -> None:
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()

    forward_backward = seconds(gradients, device, repeats)
    without, with_noise = (seconds(opt.step, device, repeats) for opt in (plain, noisy))
    noise = with_noise - without
    return [
        f"forward and backward {forward_backward * 1e3:.1f} ms, step without noise {without * 1e3:.1f}, with "
        f"{with_noise * 1e3:.1f}: noise is {noise / with_noise:.1%} of the step and "
        f"{noise / (forward_backward + with_noise):.1%} of a training step"
    ]


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="sizes that a CPU gets through in seconds")
    parser.add_argument("--only", default="", help="a part of a section's title")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; --device cpu --small is the dry run")
    repeats = 1 if args.small else 5 if args.device == "cpu" else 20
    backend = "eager" if args.small else "inductor"
    shapes = SETS["tiny" if args.small else "gpt2-small"]
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"gpu_checks_{args.device}"
    square = [(64, 64)] * 2 if args.small else [(768, 768)] * 4
    sizes = [32, 64] if args.small else [128, 256, 512, 768, 1024, 1536, 2048]
    kinds = [(48, 96)] if args.small else PATH_SHAPES[args.device]
    sections: dict[str, Callable[[], list[str]]] = {
        "Host synchronisation in a step": lambda: synchronisation(args.device, shapes, stem.with_suffix(".trace.json")),
        "Recompilation": lambda: recompilation(args.device, square, backend),
        "Batching by n": lambda: batching(args.device, sizes, 8, repeats),
        "Paths of the polar factor": lambda: paths(args.device, kinds, repeats),
        "Noise's share": lambda: noise_share(args.device, args.small, repeats),
    }
    where = machine.line("; ", " ")
    lines = ["# What a GPU is asked", "", f"Written by `benchmarks/gpu_checks.py`. Machine: {where}."]
    for title, section in sections.items():
        if args.only.lower() in title.lower():
            lines += ["", f"## {title}", "", *section()]
    write_page(stem.with_suffix(".md"), lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
