"""What the lab's training loop costs over a bare one: the same model, optimizer and batches, windows taking turns.

    python benchmarks/training_loop.py              # about three minutes on two cores

The bare loop is `bare_step` below. The lab's windows hold everything `layerwise train` does between evaluations: metrics,
layer rates, TensorBoard and progress at their default cadence. Processor time, so that a busy machine does not matter.
Writes `benchmarks/results/training_loop.md`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

import machine
from layerwise.lab.config.schema import Config
from layerwise.lab.data.batches import TextData
from layerwise.lab.models.families import build_model
from layerwise.lab.models.family import Examples
from layerwise.lab.optimizers.registry import build_optimizer
from layerwise.lab.training.observers import Observer
from layerwise.lab.training.run import complete, train
from script import RESULTS, documented_parser, write_page


class BareLoop:
    """What a user would write."""

    def __init__(self, config: Config) -> None:
        self.data = TextData(config)
        self.model = build_model(config.model, Examples(self.data.vocab_size, config.data.seq_len, None), 0)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.scheduler = LambdaLR(self.optimizer, lambda step: config.schedule.factor(step, config.training.steps))
        self.step = 0

    def bare_step(self) -> None:
        batch = self.data.batch(self.step)
        logits = self.model(input_ids=batch.inputs, use_cache=False).logits
        cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten()).backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1


class TakeTurns(Observer):
    """After each of the lab's windows, the bare loop's; the first of each is warm-up."""

    def __init__(self, bare: BareLoop, window: int) -> None:
        self.bare, self.window = bare, window
        self.lab_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.started = time.process_time()

    @contextmanager
    def around_step(self, step: int) -> Iterator[None]:
        if step > 1 and (step - 1) % self.window == 0:  # here the step before is over, its metrics written
            now = time.process_time()
            self.lab_seconds.append(now - self.started)
            for _ in range(self.window):
                self.bare.bare_step()
            self.bare_seconds.append(time.process_time() - now)
            self.started = time.process_time()
        yield


def measure(overrides: dict[str, Any], window: int, windows: int) -> tuple[float, float, float]:
    """Median seconds of a step of the lab's loop and of the bare one, and the median of the windows' ratios."""
    with tempfile.TemporaryDirectory() as folder:
        steps = window * (windows + 2) + 1
        changes = {"run.dir": folder, "training.steps": steps, "training.eval_every": 0, **overrides}
        config = complete(Config().replace({**changes, "training.checkpoint_every": 0}))
        turns = TakeTurns(BareLoop(config), window)
        train(config, observers=[turns])
    lab, bare = turns.lab_seconds[1:], turns.bare_seconds[1:]
    ratio = statistics.median(a / b for a, b in zip(lab, bare, strict=True))
    return statistics.median(lab) / window, statistics.median(bare) / window, ratio


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--window", type=int, default=10, help="steps in a window")
    parser.add_argument("--windows", type=int, default=12, help="windows of each loop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, overrides in {
        "gpt2-tiny, 2,048 tokens a step": {},
        "gpt2-tiny, 256 tokens a step": {"training.batch_size": 2},
    }.items():
        for optimizer in ("adamw", "lanton"):
            lab, bare, ratio = measure({**overrides, "optimizer.name": optimizer}, args.window, args.windows)
            rows.append(f"| {name} | {optimizer} | {1e3 * bare:.0f} | {1e3 * lab:.0f} | {ratio:.3f} |")
            print(rows[-1], flush=True)
    where = machine.line("; ", " ")
    lines = [
        "# The lab's training loop against a bare one",
        "",
        f"`python benchmarks/training_loop.py --window {args.window} --windows {args.windows}`, {where}.",
        "Milliseconds of processor time per optimizer step, one thread; the ratio is the median over windows in turns.",
        "Ratios below 1 are no gain of the lab's; one difference is that the bare windows run while its gradients are held.",
        "",
        "| work | optimizer | bare, ms | lab, ms | ratio |",
        "|---|---|---|---|---|",
        *rows,
    ]
    write_page(RESULTS / "training_loop.md", lines)


if __name__ == "__main__":
    main()
