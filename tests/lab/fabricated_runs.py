"""Run directories made up by formula: the files of the contract in docs/architecture.md, without any training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

MATRICES = {
    "attn.c_attn.weight": ["q", "k", "v"],
    "attn.c_proj.weight": None,
    "mlp.c_fc.weight": None,
    "mlp.c_proj.weight": None,
}
VECTORS = ["ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"]
NOISE_OF = {
    "q": 0.6,
    "k": 0.7,
    "v": 1.4,
    "attn.c_proj.weight": 1.2,
    "mlp.c_fc.weight": 3.0,
    "mlp.c_proj.weight": 1.0,
}
SCALE_OF = {"spectral": 900.0, "sign": 0.4, "vector_rms": 6.0}


def parameter_table(blocks: int) -> list[dict[str, Any]]:
    def row(name: str, role: str, geometry: str, group: str, shape: list[int], units: list[str]) -> dict[str, Any]:
        return {
            "name": name, "role": role, "geometry": geometry, "norm_group": group, "shape": shape,
            "layout": "Matrix()", "units": units,
        }  # fmt: skip

    rows = [row("transformer.wte.weight", "embedding", "Sign()", "sign", [2048, 128], ["transformer.wte.weight"])]
    rows.append(row("transformer.wpe.weight", "embedding", "Sign()", "sign", [128, 128], ["transformer.wpe.weight"]))
    for b in range(blocks):
        for part in VECTORS[:2]:
            name = f"transformer.h.{b}.{part}"
            rows.append(row(name, "vector", "VectorRMS()", "vector_rms", [128], [name]))
        for part, split in MATRICES.items():
            name = f"transformer.h.{b}.{part}"
            units = [f"{name}[{s}]" for s in split] if split else [name]
            rows.append(row(name, "hidden", "Spectral()", "spectral", [128, 384], units))
        for part in VECTORS[2:]:
            name = f"transformer.h.{b}.{part}"
            rows.append(row(name, "vector", "VectorRMS()", "vector_rms", [128], [name]))
    rows.append(
        row(
            "transformer.ln_f.weight",
            "vector",
            "VectorRMS()",
            "vector_rms",
            [128],
            ["transformer.ln_f.weight"],
        )
    )
    return rows


def adapter_table(blocks: int) -> list[dict[str, Any]]:
    """The parameters of a model whose attention has low-rank adapters."""
    rows = []
    for b in range(blocks):
        for part, (down, up) in {"c_attn": (128, 384), "c_proj": (128, 128)}.items():
            for letter, shape in {"A": [8, down], "B": [up, 8]}.items():
                name = f"base_model.model.transformer.h.{b}.attn.{part}.lora_{letter}.default.weight"
                rows.append(
                    {
                        "name": name, "role": f"lora_{letter}", "geometry": "Spectral()", "norm_group": "spectral",
                        "shape": shape, "layout": "out,in", "units": [name],
                    }
                )  # fmt: skip
    return rows


def fabricate(
    folder: Path,
    optimizer: str,
    *,
    adapters: bool = False,
    seed: int = 0,
    lr: float = 0.01,
    steps: int = 400,
    blocks: int = 4,
    final: float = 3.2,
    rate: float = 60.0,
    with_layers: bool = True,
    with_function_space: bool = False,
    status: str = "finished",
    corpus: str = "a" * 64,
) -> Path:
    """Write one run directory: `final` is where its loss goes, `rate` its optimizer steps a second over ten."""
    folder.mkdir(parents=True)
    rng = random.Random(f"{optimizer} {seed} {lr}")
    table = adapter_table(blocks) if adapters else parameter_table(blocks)
    loss_at = lambda t: final + 0.02 * seed + (7.6 - final) * math.exp(-5 * (t / steps) ** 0.6)  # noqa: E731
    metrics, layers, function_space = [], [], []
    for step in range(5, steps + 1, 5):
        factor = min(1.0, step / 20) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        line = {
            "step": step, "tokens": step * 2048, "seconds": step / rate * 10, "loss": loss_at(step) + rng.gauss(0, 0.06),
            "lr": lr * factor, "grad_norm": 1.0 + rng.random(), "tokens_per_second": 2048 * rate / 10,
        }  # fmt: skip
        if step % 50 == 0:
            line["val_loss"] = loss_at(step) + 0.05 + rng.gauss(0, 0.01)
        metrics.append(line)
        entry = {}
        shares = {}
        for row in table:
            for unit in row["units"]:
                part = unit.split(f"h.{_block(unit)}.")[-1]
                key = part.split("[")[-1].rstrip("]") if "[" in part else part
                base = NOISE_OF.get(key, 1.0) * (1 + 0.25 * _block(unit)) * (0.4 + math.exp(-4 * step / steps))
                noise = base * math.exp(rng.gauss(0, 0.05)) * SCALE_OF[row["norm_group"]]
                multiplier = min(1.0, (0.6 / NOISE_OF.get(key, 1.0) / (1 + 0.25 * _block(unit))) ** 0.5)
                multiplier = 1 - (1 - multiplier) * min(1.0, step / (0.2 * steps))
                entry[unit] = {"squared_norm": noise, "multiplier": multiplier, "lr": lr * factor * multiplier}
            share = NOISE_OF.get(row["name"].split(f"h.{_block(row['name'])}.")[-1], 0.4) * (1 + 0.1 * _block(row["name"]))
            shares[row["name"]] = share * factor
        layers.append({"step": step, "layers": entry})
        total = sum(shares.values())
        rates = {n: {"value": v * lr, "stderr": 0.04 * v * lr, "share": v / total} for n, v in shares.items()}
        function_space.append({"step": step, "rates": rates})
    record = {
        "format": 1,
        "name": folder.name,
        "status": status,
        "config": {
            "model": {"preset": "gpt2-tiny"},
            "data": {"source": "builtin", "seq_len": 128},
            "optimizer": {"name": optimizer, "lr": lr},
            "training": {"steps": steps, "seed": seed},
            "run": {"name": folder.name},
        },
        "versions": {"python": "3.11.9", "torch": "2.13.0", "layerwise": "0.1.0"},
        "machine": {"system": "Linux x86_64", "processors": 2, "device": "cpu"},
        "corpus": {"source": "builtin", "sha256": corpus, "training_tokens": 3_000_000},
        "parameters": table,
        "parameter_count": 1_100_000,
        "started": "2026-01-01T00:00:00+00:00",
        "result": {"steps": steps, "tokens": steps * 2048, "seconds": steps / rate * 10},
    }
    (folder / "run.json").write_text(json.dumps(record))
    write_lines(folder / "metrics.jsonl", metrics)
    if with_layers:
        write_lines(folder / "layers.jsonl", layers)
    if with_function_space:
        write_lines(folder / "function_space.jsonl", function_space)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _block(unit: str) -> int:
    return int(unit.split("h.", 1)[1].split(".")[0]) if ".h." in unit else 0
