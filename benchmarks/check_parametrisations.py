"""Which optimizers and which of Muon's scalings do the same at every width, and in which layers: `lw.check` of a decoder.

    python benchmarks/check_parametrisations.py        # writes results/check_parametrisations.md

The paper's PreNorm decoder (weights normal with variance 1/fan_in, head included) on bytes of the standard library.
"""

from __future__ import annotations

import argparse
import csv
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import layerwise as lw
import machine
from layerwise.lab.models.paper import Decoder
from script import RESULTS, write_page

WIDTHS = (32, 64, 128, 256)
STEPS = (1, 10)
TEXT = b"".join(Path(module.__file__).read_bytes() for module in (argparse, csv, difflib))


@dataclass(frozen=True)
class Method:
    """An optimizer, how it is matched, and what its like is called elsewhere."""

    build: Callable[[Decoder], torch.optim.Optimizer]
    match: str | None = None
    note: str = ""


def muon(scaling: str) -> Callable[[Decoder], torch.optim.Optimizer]:
    def build(model: Decoder) -> torch.optim.Optimizer:
        groups = lw.param_groups(model)
        for group in groups:
            if group["role"] == "hidden":
                group["scaling"] = scaling
        return lw.Muon(groups, lr=0.02, adamw_lr=2e-3)

    return build


def adam(lr: float) -> Callable[[Decoder], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)


def one_over_width(model: Decoder) -> torch.optim.Optimizer:
    """muP's rule for Adam on the same weights: hidden matrices and head at 1/width of the rate."""
    wide = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("embedding")]
    rest = [p for p in model.parameters() if all(p is not w for w in wide)]
    lr = 2e-3 * WIDTHS[0] / model.head.in_features
    return torch.optim.AdamW([{"params": wide, "lr": lr}, {"params": rest, "lr": 2e-3}], weight_decay=0.0)


METHODS: Mapping[str, Method] = {
    "AdamW": Method(adam(2e-3)),
    "AdamW, 1/width": Method(one_over_width, note="muP's rates, not its smaller head"),
    "AdamW, FLeRM": Method(adam(2e-3), "first"),
    "AdamW, uniform": Method(adam(0.2), "uniform"),
    "Muon, floored": Method(muon("floored"), note="Jordan's; torch's original; Megatron's shape_scaling"),
    "Muon, unit": Method(muon("unit"), note="Scion's; Megatron's unit_rms_norm"),
    "Muon, rms_0.2": Method(
        muon("rms_0.2"), note="Moonlight's; torch's match_rms_adamw; Megatron's spectral, 5 times as large"
    ),
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """8 sequences of 33 bytes: inputs and next bytes."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(TEXT) - 33, (8,), generator=generator)
    rows = torch.stack([torch.tensor(list(TEXT[i : i + 33])) for i in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def make(width: int) -> nn.Module:
    return Decoder(256, norm="pre", width=width // 32, attention="eager")


def summary(check: lw.SizeCheck, step: int) -> list[str]:
    """The slope of each kind of layer: the mean over blocks."""
    cells = []
    for kind in ("embedding", "query", "key", "value", "out", "up", "down", "head"):
        slopes = [t.slope for t in check.of("rate", step) if t.module.split(".")[-1] == kind and t.slope is not None]
        cells.append(f"{sum(slopes) / len(slopes):+.2f}" if slopes else "")
    return cells


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        "# What is flat in the width, layer by layer",
        "",
        "Slope of the log of the function-space rate against that of the width (32, 64, 128, 256), mean over the two",
        "blocks; two seeds. PreNorm decoder of the paper, batches of 8 x 32 bytes. 0: the same rate fits every width;",
        "+1: it should fall as 1/width. From `python benchmarks/check_parametrisations.py`.",
        "",
        "| method | step | embedding | query | key | value | out | up | down | head | flat | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, method in METHODS.items():
        found = lw.check(make, WIDTHS, method.build, batch, STEPS, match=method.match)
        for step in STEPS:
            trends = found.of("rate", step)
            flat = sum(t.verdict(found.tolerance) in ("flat", "none", "unclear") for t in trends)
            cells = " | ".join(summary(found, step))
            lines.append(f"| {name} | {step} | {cells} | {flat} of {len(trends)} | {method.note} |")
            print(lines[-1], flush=True)
    write_page(RESULTS / "check_parametrisations.md", [*lines, "", machine.line(", ")])


if __name__ == "__main__":
    main()
