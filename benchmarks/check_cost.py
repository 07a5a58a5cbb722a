"""What `layerwise check` costs: processor seconds and memory of the whole command, start to figure, at three small sizes.

    python benchmarks/check_cost.py            # writes results/check_cost.md; under two minutes of one core

Each check is a process of its own, whose processor time and largest memory the system tells: on a shared machine the wall
clock measures the neighbours. Steps 1, 10 and 100 and two seeds, as by default.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import machine
from script import RESULTS, documented_parser, write_page

ROOT = Path(__file__).parents[1]
GPT2 = ["model.preset=gpt2-tiny", "model.n_layer=2", "model.n_embd=64", "model.n_head=4"]
BYTES = ["data.tokenizer=byte", "data.seq_len=32", "training.batch_size=8", "optimizer.name=adamw"]

#: What is checked, and the command's arguments.
CHECKS: dict[str, list[str]] = {
    "a user's function, an MLP (examples/check_widths.py)": [
        "examples.check_widths:make", "--sizes", "64,128,256",
    ],
    "the paper's PreNorm decoder of 2 blocks, 8 x 32 bytes": [
        "configs/gpt2.yaml", "model.preset=decoder", "model.norm=pre", "model.base_width=64", "model.base_heads=4",
        *BYTES, "optimizer.lr=0.002", "--sizes", "64,128,256",
    ],
    "transformers' GPT-2 of 2 blocks, 8 x 32 bytes": [
        "configs/gpt2.yaml", *GPT2, *BYTES, "optimizer.lr=0.002", "--sizes", "64,128,256",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of one command.

    Attributes:
        seconds: of the processor, children included.
        mebibytes: the largest memory at any time.
        status: its exit code: 0 passed, 1 some modules grow or shrink.
        verdict: the last line that it printed.
    """

    seconds: float
    mebibytes: float
    status: int
    verdict: str


def cost(arguments: list[str]) -> Cost:
    """Runs a check on one thread and asks the system what it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "layerwise", "check", *arguments, "-o", str(Path(folder) / "check")]
        with tempfile.TemporaryFile("w+") as printed:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=printed, stderr=printed, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            _, waited, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(waited)
            printed.seek(0)
            lines = [line for line in printed.read().splitlines() if line.strip()]
    if process.returncode not in (0, 1):
        raise SystemExit("\n".join(lines))
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, process.returncode, lines[-1])


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print, and leave the results file alone")
    options = parser.parse_args()
    lines = [
        "# What `layerwise check` costs",
        "",
        "The whole command at sizes 64, 128 and 256, steps 1, 10 and 100, two seeds, one thread:",
        "`python benchmarks/check_cost.py`. Exit code 1: some modules grow or shrink.",
        "",
        "| what is checked | processor seconds | largest memory | exit code |",
        "|---|---:|---:|---:|",
    ]
    for name, arguments in CHECKS.items():
        found = cost(arguments)
        lines.append(f"| {name} | {found.seconds:.0f} | {found.mebibytes:.0f} MiB | {found.status} |")
        print(lines[-1], found.verdict, flush=True)
    if not options.dry_run:
        write_page(RESULTS / "check_cost.md", [*lines, "", machine.line(", ")])


if __name__ == "__main__":
    main()
