"""What measuring costs, and how exact it is: against a plain step, the official procedure, and the exact rates.

    python benchmarks/function_space.py [--write]

Time: all variants in turn, round after round, on the same model and batch; medians over rounds of the ratio to the plain
(official) step of the same round, in processor time on one thread. Error: of the rates of one step of Adam, in per cent of
the exact ones on that batch: bias (mean) and standard deviation over seeds of probes, averaged over tensors. Extra
memory: the peak of a step less that of a plain step, as the allocator saw it, in copies of the parameters. The official
procedure is a literal copy (tests/function_space/naive.py); its 41 probes are on one batch here, as ours are.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from math import isnan, nan
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import machine
from layerwise.function_space import FunctionSpaceRecorder, function_space_rates
from script import RESULTS, documented_parser

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

    def backward(self, model: nn.Module) -> None:
        outputs = model(self.x)
        nn.functional.nll_loss(outputs[:, :-1].flatten(0, 1), self.x[:, 1:].flatten()).backward()

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
        other = self.part(part)

        def step() -> None:
            optimizer.zero_grad()
            self.backward(model)
            with recorder.step(other):
                optimizer.step()

        return step

    def part(self, part: int) -> Tensor:
        return self.other[: max(1, len(self.other) // part)]

    def errors(self, settings: dict, seeds: int) -> dict[str, tuple[float, float]]:
        """Bias and standard deviation in per cent, of matrices and of vectors."""
        model, optimizer = self.start()
        for _ in range(4):
            old = {n: p.detach().clone() for n, p in model.named_parameters()}
            optimizer.zero_grad()
            self.backward(model)
            optimizer.step()
        update = {n: p.detach() - old[n] for n, p in model.named_parameters()}
        exact = function_space_rates(model, update, self.other, method="exact")
        kept = [n for n in exact if exact[n].value > 1e-4 * exact.total]
        found = []
        for seed in range(seeds):
            if settings["method"] == "official":
                rates = self.official_rates(model, update, seed)
            else:
                inputs = self.part(settings.get("part", 1))
                options = {key: value for key, value in settings.items() if key != "part"}
                measured = function_space_rates(model, update, inputs, seed=seed, **options)
                rates = {n: measured[n].value for n in kept}
            found.append([100 * (rates[n] / exact[n].value - 1) for n in kept])
        table = torch.tensor(found)
        matrix = torch.tensor([update[n].ndim == 2 for n in kept])
        return {
            kind: (table[:, which].mean().item(), table[:, which].std(0).mean().item() if seeds > 1 else 0.0)
            for kind, which in (("matrices", matrix), ("vectors", ~matrix))
        }

    def official_rates(self, model: nn.Module, update: dict[str, Tensor], seed: int) -> dict[str, float]:
        """What the official procedure reads for this update: `saved` is what the weights became."""
        groups = [{"params": [p], "lr": 1.0} for p in model.parameters()]
        naive = NaiveFLeRM(model, torch.optim.SGD(groups), [1.0] * len(groups), 1.0, method="kronecker")
        # Its swap puts `saved` into the model and takes the difference: here the measured weights and the moved ones.
        with torch.no_grad():
            for name, p in model.named_parameters():
                naive.saved[name].copy_(p)
                p.add_(update[name])
        torch.manual_seed(seed)
        for _ in range(PROBES):
            naive.call(self.other, modify=False)
        naive.swap()
        model.zero_grad()
        return dict(naive.delta)


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


OFFICIAL = f"official, kronecker, {PROBES} probes"


def variants(examples: int) -> dict[str, dict]:
    """Settings by name; `slices` of one example each are the most that can be had."""
    found: dict[str, dict] = {OFFICIAL: {"method": "official"}}
    for method in ("kronecker", "full_cov"):
        for slices in dict.fromkeys((1, "auto", min(examples, PROBES))):
            if slices == "auto" and examples <= PROBES // 4:
                continue  # the same as one example each
            name = f"{method}, {PROBES} probes, slices={slices}"
            found[name] = {"method": method, "probes": PROBES, "slices": slices}
    found["exact"] = {"method": "exact", "probes": 1}
    most = min(16, examples)
    found[f"kronecker, 16 probes, slices={most}"] = {"method": "kronecker", "probes": 16, "slices": most}
    for method in ("kronecker", "full_cov"):
        most = min(8, examples)
        found[f"{method}, 8 probes, slices={most}"] = {"method": method, "probes": 8, "slices": most}
        most = max(1, min(8, examples // 4))
        found[f"{method}, 8 probes, slices={most}, a quarter of the batch"] = {
            "method": method, "probes": 8, "slices": most, "part": 4,
        }  # fmt: skip
    return found


#: Where the model is large enough that operations take longer than starting them; the official procedure is left out.
FREQUENT: dict[str, dict] = {
    "kronecker, 41 probes, slices=auto": {"method": "kronecker", "probes": PROBES, "slices": "auto"},
    "kronecker, 8 probes, slices=8": {"method": "kronecker", "probes": 8, "slices": 8},
    "kronecker, 8 probes, slices=4, a quarter of the batch": {
        "method": "kronecker", "probes": 8, "slices": 4, "part": 4,
    },
    "full_cov, 8 probes, slices=8": {"method": "full_cov", "probes": 8, "slices": 8},
    "full_cov, 8 probes, slices=4, a quarter of the batch": {
        "method": "full_cov", "probes": 8, "slices": 4, "part": 4,
    },
}  # fmt: skip


def costs(width: int, examples: int, length: int, rounds: int, seeds: int, chosen: dict[str, dict]) -> list[str]:
    """Table of time and error."""
    bench = Bench(width, examples, length)
    steps = {
        name: bench.official("kronecker") if s["method"] == "official" else bench.ours(**s) for name, s in chosen.items()
    }
    steps = {"plain step": bench.plain(), **steps}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    parameters = sum(p.numel() for p in bench.start()[0].parameters())
    lines = [
        f"{parameters / 1e6:.1f}M parameters, batch {examples} x {length}; medians of {rounds} rounds, {seeds} seeds.",
        "",
        "| variant | time / plain step | time / official | training time at every=100 | matrices: bias, deviation |"
        " vectors: bias, deviation |",
        "|---|---|---|---|---|---|",
    ]
    for name, settings in chosen.items():
        to_plain, to_official = (
            statistics.median(t / o for t, o in zip(times[name], times.get(other, [nan]), strict=False))
            for other in ("plain step", OFFICIAL)
        )
        error = bench.errors(settings, 1 if settings["method"] == "exact" else seeds)
        shown = " | ".join(f"{bias:+.1f} %, {deviation:.1f} %" for bias, deviation in error.values())
        shown_official = "" if isnan(to_official) else f"{to_official:.2f}"
        lines.append(f"| {name} | {to_plain:.1f} | {shown_official} | {to_plain - 1:+.1f} % | {shown} |")
    return lines


def memory(width: int, examples: int, length: int) -> list[str]:
    """Table of extra memory."""
    bench = Bench(width, examples, length)
    model = bench.start()[0]
    bytes_ = sum(4 * p.numel() for p in model.parameters())
    largest = max(4 * p.numel() for p in model.parameters())
    plain = bench.plain()
    plain()
    without = peak_bytes(plain)
    lines = [
        f"{bytes_ / 4e6:.1f}M parameters, batch {examples} x {length}; largest tensor {largest / bytes_:.2f} of them.",
        "",
        "| variant | extra memory (copies of the parameters) |",
        "|---|---|",
    ]
    steps = {OFFICIAL: bench.official("kronecker")}
    for method in ("kronecker", "full_cov"):
        for slices, budget in ((1, 0), (examples, 0), (examples, 64 << 20)):
            name = f"{method}, {PROBES} probes, slices={slices}, memory={budget >> 20} MiB"
            steps[name] = bench.ours(method, PROBES, slices=slices, memory=budget)
    steps["exact"] = bench.ours("exact", 1)
    for name, step in steps.items():
        step()
        # The official procedure's copy of the weights is there already.
        extra = (peak_bytes(step) - without) / bytes_ + (1 if name == OFFICIAL else 0)
        lines.append(f"| {name} | {extra:.2f} |")
    return lines


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/function_space.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    blocks = [
        [
            "# What measuring function-space rates costs",
            "",
            f"`python benchmarks/function_space.py`, {machine.line('; ', ' ')}.",
        ]
    ]
    blocks += [costs(128, examples, 64, args.rounds, args.seeds, variants(examples)) for examples in (4, 16)]
    blocks += [costs(512, 16, 128, args.rounds, args.seeds, FREQUENT)]
    blocks += [memory(512, 2, 32)]
    text = "\n\n".join("\n".join(lines) for lines in blocks) + "\n"
    print(text)
    if args.write:
        (RESULTS / "function_space.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
