"""What measuring costs: a measured optimizer step against a plain one, and against the official procedure.

    python benchmarks/function_space.py [--width 128] [--rounds 5]

All variants are timed in turn, round after round, on the same model and batch; the table gives medians over rounds
of the ratio to the plain step of the same round, in processor time on one thread. Extra memory is the peak of a step
less that of a plain step, as the allocator saw it, in copies of the parameters. The official procedure is a
literal copy (tests/function_space/naive.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from layerwise.function_space import FunctionSpaceRecorder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "function_space"))
from naive import NaiveFLeRM

PROBES = 41


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """The shape of the paper's: two blocks, a vocabulary, log-probabilities as outputs."""

    def __init__(self, width: int, vocabulary: int = 512) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(x)))).log_softmax(-1)


class Bench:
    """One model and optimizer per variant, so that none sees another's state."""

    def __init__(self, width: int, batch: int, length: int) -> None:
        self.width = width
        generator = torch.Generator().manual_seed(0)
        self.x, self.other = torch.randint(0, 512, (2, batch, length), generator=generator)

    def start(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Transformer(self.width)
        groups = [{"params": [p]} for p in model.parameters()]
        return model, torch.optim.Adam(groups, lr=1e-4)

    def backward(self, model: nn.Module, keep: bool = False) -> Tensor:
        outputs = model(self.x)
        nn.functional.nll_loss(outputs[:, :-1].flatten(0, 1), self.x[:, 1:].flatten()).backward(
            retain_graph=keep
        )
        return outputs

    def plain(self) -> Callable[[], None]:
        model, optimizer = self.start()

        def step() -> None:
            optimizer.zero_grad()
            self.backward(model)
            optimizer.step()

        return step

    def official(self, method: str) -> Callable[[], None]:
        model, optimizer = self.start()
        naive = NaiveFLeRM(model, optimizer, [0.1] * len(optimizer.param_groups), 1e-4, method=method)

        def step() -> None:
            optimizer.zero_grad()
            self.backward(model)
            naive.save_weights()
            optimizer.step()
            for _ in range(PROBES):
                naive.call(self.other, modify=False)

        return step

    def ours(self, method: str, probes: int, part: int = 1, **options: object) -> Callable[[], None]:
        model, optimizer = self.start()
        recorder = FunctionSpaceRecorder(model, optimizer, every=1, method=method, probes=probes, **options)
        other = self.other[: max(1, len(self.other) // part)]

        def step() -> None:
            optimizer.zero_grad()
            self.backward(model)
            with recorder.step(other):
                optimizer.step()

        return step

    def outputs(self, method: str, probes: int) -> Callable[[], None]:
        model, optimizer = self.start()
        recorder = FunctionSpaceRecorder(model, optimizer, every=1, method=method, probes=probes)

        def step() -> None:
            optimizer.zero_grad()
            outputs = self.backward(model, keep=True)
            with recorder.step(outputs=outputs):
                optimizer.step()

        return step


def peak_bytes(step: Callable[[], None]) -> int:
    """The largest amount allocated at any time during the step beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="*", help="keep the variants whose name holds one of these, and the plain step"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.width, args.batch, args.length)
    variants = {
        "plain step": bench.plain(),
        f"official, kronecker, {PROBES} probes": bench.official("kronecker"),
        f"kronecker, {PROBES} probes": bench.ours("kronecker", PROBES),
        f"kronecker, {PROBES} probes, memory=0": bench.ours("kronecker", PROBES, memory=0),
        f"full_cov, {PROBES} probes": bench.ours("full_cov", PROBES),
        f"iid, {PROBES} probes": bench.ours("iid", PROBES),
        f"kronecker, {PROBES} probes, outputs=": bench.outputs("kronecker", PROBES),
        "exact": bench.ours("exact", 1),
        "kronecker, 16 probes": bench.ours("kronecker", 16),
        "kronecker, 8 probes, an eighth of the batch": bench.ours("kronecker", 8, part=8),
    }
    if args.only:
        kept = [name for name in variants if any(part in name for part in ("plain", "official", *args.only))]
        variants = {name: variants[name] for name in kept}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for step in variants.values():
        step()
    for _ in range(args.rounds):
        for name, step in variants.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    parameters = sum(4 * p.numel() for p in bench.start()[0].parameters())
    peaks = {name: peak_bytes(step) for name, step in variants.items()}
    official = times[f"official, kronecker, {PROBES} probes"]
    plain = times["plain step"]
    print(f"{parameters / 4e6:.1f}M parameters, batch {args.batch} x {args.length}, one thread")
    print(
        "| variant | time of a plain step | of the official step | training time at every=100 | extra memory (copies) |"
    )
    print("|---|---|---|---|---|")
    for name, taken in times.items():
        to_plain = statistics.median(t / p for t, p in zip(taken, plain, strict=True))
        to_official = statistics.median(t / o for t, o in zip(taken, official, strict=True))
        extra = (peaks[name] - peaks["plain step"]) / parameters + (1 if name.startswith("official") else 0)
        print(f"| {name} | {to_plain:.2f} | {to_official:.2f} | {to_plain - 1:+.1f} % | {extra:.2f} |")


if __name__ == "__main__":
    main()
