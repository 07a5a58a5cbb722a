"""What `lw.watch` costs: the time its hooks take, as a part of training time, on GPT-2s on one core of a CPU.

    python benchmarks/watch_overhead.py            # writes results/watch_overhead.md; about two minutes

The hooks' own CPU time is taken, and not the difference of two runs, which on a shared machine is mostly the neighbours'.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import layerwise as lw
import machine
from script import RESULTS, documented_parser, write_page


@dataclass(frozen=True)
class Setting:
    """A model, a batch and an optimizer."""

    width: int
    blocks: int
    sequences: int
    tokens: int
    optimizer: str

    def __str__(self) -> str:
        return f"{self.blocks} blocks of {self.width}, {self.sequences} x {self.tokens} tokens, {self.optimizer}"


SETTINGS = [
    Setting(64, 2, 16, 64, "AdamW"),
    Setting(128, 4, 16, 64, "AdamW"),
    Setting(256, 4, 16, 128, "AdamW"),
    Setting(256, 4, 16, 128, "Muon"),
]


def build(setting: Setting) -> tuple[GPT2LMHeadModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_positions=setting.tokens, n_embd=setting.width, n_layer=setting.blocks,
        n_head=setting.width // 32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    if setting.optimizer == "Muon":
        return model, lw.Muon(lw.param_groups(model), lr=1e-2)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


class TimedWatch(lw.Watch):
    """A watch that knows what it costs: CPU seconds in its hooks, by step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.seconds: dict[int, float] = {}
        super().__init__(*args, **options)

    def _before_step(self, *args: Any) -> None:
        started = time.process_time()
        super()._before_step(*args)
        self.seconds[self.steps + 1] = time.process_time() - started

    def _after_step(self, *args: Any) -> None:
        started = time.process_time()
        super()._after_step(*args)
        self.seconds[self.steps] += time.process_time() - started


@dataclass(frozen=True)
class Costs:
    """CPU seconds: of a plain step, of a recorded one's hooks beyond it, and of one measured in function space."""

    step: float
    record: float
    function_space: float

    def per_cent(self, every: int, function_space_every: int = 0) -> float:
        """What is added to training time at these intervals; medians, so that the first record's set-up does not count."""
        added = self.record / every
        if function_space_every:
            added += (self.function_space - self.record) / function_space_every
        return 100 * added / self.step


def costs(setting: Setting, records: int) -> Costs:
    """Medians over some records, the step before each of which keeps its gradients."""
    model, optimizer = build(setting)
    watch = TimedWatch(model, optimizer, 4, function_space_every=8)
    generator = torch.Generator().manual_seed(0)
    plain = []
    for step in range(1, 8 * records + 1):
        tokens = torch.randint(512, (setting.sequences, setting.tokens), generator=generator)
        started = time.process_time()
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        plain.append(time.process_time() - started - watch.seconds[step])
    assert not watch.skipped, watch.skipped

    def median(steps: range) -> float:
        return statistics.median(watch.seconds[step] + watch.seconds[step - 1] for step in steps)

    every = range(8, 8 * records + 1, 8)
    return Costs(statistics.median(plain), median(range(4, 8 * records, 8)), median(every))


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--records", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="print, and leave the results file alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# What watching costs",
        "",
        "CPU time of `lw.watch`'s hooks, per cent of training time, on one core: `python benchmarks/watch_overhead.py`.",
        "",
        "| model, batch and optimizer | a step | a record | in function space | every=10 | and function space every 200 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for setting in SETTINGS:
        found = costs(setting, options.records)
        times = " | ".join(f"{1000 * x:.1f} ms" for x in (found.step, found.record, found.function_space))
        lines.append(f"| {setting} | {times} | {found.per_cent(10):.2f} % | {found.per_cent(10, 200):.2f} % |")
        print(lines[-1], flush=True)
    if not options.dry_run:
        write_page(RESULTS / "watch_overhead.md", [*lines, "", machine.line(", ")])


if __name__ == "__main__":
    main()
