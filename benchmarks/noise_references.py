"""LANTON's noise options on a real run: do their multipliers agree, and what do they do to the loss?

    layerwise compare configs/tune-gpt2-tiny.yaml --optimizers lanton,lanton-momentum,lanton-bf16
    python benchmarks/noise_references.py runs/tune-gpt2-tiny

Takes the runs of one base rate (the largest that all options have), one option a folder, and correlates the logarithms of
their multipliers with the paper's option over all spectral units and recorded steps. Writes
`benchmarks/results/noise_references.md`.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from layerwise.lab.runs.directory import Run, find_runs, read_run
from script import RESULTS, documented_parser, write_page

OPTIONS = {
    "previous": "the paper's: the gradient of the step before",
    "previous_bf16": "the same, kept in bfloat16",
    "momentum": "no buffer: the momentum",
}
PARTS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def option(run: Run) -> str | None:
    """The noise reference of a run of plain LANTON; None for any other run."""
    optimizer = run.config["optimizer"]
    noise = optimizer.get("rates") or {}
    plain = set(noise) <= {"rule", "reference"} and noise.get("rule") in (None, "noise_adaptive")
    return noise.get("reference", "previous") if optimizer["name"] == "lanton" and plain else None


def multipliers(run: Run) -> np.ndarray:
    """`log multiplier`, [recorded steps, spectral units]."""
    rows = [row["layers"] for row in run.layers]
    units = [unit for unit in rows[0] if any(part in unit for part in PARTS)]
    return np.log([[row[unit]["multiplier"] for unit in units] for row in rows])


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    runs = [read_run(path) for path in find_runs(folder)]
    found = {(option(run), run.config["optimizer"]["lr"]): run for run in runs if option(run)}
    rates = [{lr for name, lr in found if name == wanted} for wanted in OPTIONS]
    lr = max(set.intersection(*rates))
    truth = multipliers(found["previous", lr])
    lines = [
        "# Noise options on a real run",
        "",
        f"`python benchmarks/noise_references.py {folder}`: LANTON on gpt2-tiny, base rate {lr:g}, one seed, "
        f"{truth.shape[1]} spectral units at {truth.shape[0]} steps.",
        "Correlation and typical ratio of the multipliers with the paper's option, each on its own trajectory.",
        "",
        "| reference | what G is compared with | correlation | RMS of log ratio | validation loss |",
        "|---|---|---|---|---|",
    ]
    for name, meaning in OPTIONS.items():
        run = found[name, lr]
        values = multipliers(run)
        correlation = np.corrcoef(values.ravel(), truth.ravel())[0, 1]
        apart = math.sqrt(((values - truth) ** 2).mean())
        loss = run.info["result"]["val_loss"]
        lines.append(f"| `{name}` | {meaning} | {correlation:.3f} | {apart:.3f} | {loss:.3f} |")
    print("\n".join(lines[6:]))
    write_page(RESULTS / "noise_references.md", lines)


if __name__ == "__main__":
    main()
