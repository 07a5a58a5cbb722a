"""The rate rule on a GPU: DualMuon, D-Muon tuned by role, D-Muon, LANTON and AdamW at 26 and 126 million parameters.

    python benchmarks/gpu_rates.py prepare            # here: text to token ids, in build/gpu_rates; says what to take along
    python benchmarks/gpu_rates.py run --minutes 9    # there: as many runs as fit; again until it says that nothing is left
    python benchmarks/gpu_rates.py table              # benchmarks/results/gpu_rates.md from what there is
    python benchmarks/gpu_rates.py run --device cpu --small   # the same code in seconds: the numbers mean nothing

Every contender has four settings (base rates; D-Muon by role: two rates with two factors on embedding, head and vectors),
tried on one seed, and its best one is run on two seeds more. Results are lines of `gpu_rates.jsonl` in the folder of
`--out`; put the lines of earlier calls there, and finished runs are not repeated. A run that would not be over in time is
not begun.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import machine
import rate_rule_table
from layerwise.lab.config.schema import Config
from layerwise.lab.data.tokens import bpe_ids, trained_bpe
from rate_rule import Store, as_row, fit
from rate_rule_plan import CONTENDERS, LLAMA_ROLES, Trial
from script import RESULTS, documented_parser, write_page

BUILD = Path("build/gpu_rates")
VOCABULARY, CHARACTERS = 8192, 60_000_000
SEEDS: Final = (1, 2, 3)
#: What an image with torch and transformers is likely to lack.
WHEELS: Final = ("pydantic",)
DOWNLOAD: Final = "pip download --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64"
PACKING: Final = f"""
Take along: this checkout, {BUILD} (tokens.npy, {{megabytes:.0f}} MB), and, where the other machine has no network, wheels
of what it lacks of the lab's needs (beside torch: transformers, tokenizers, scipy, matplotlib, PyYAML, pydantic), such as:
    {DOWNLOAD} -d {BUILD}/wheels {" ".join(WHEELS)}
There, with the results of earlier calls in OUT:
    pip install --no-index --find-links {BUILD}/wheels {" ".join(WHEELS)}
    PYTHONPATH=src python benchmarks/gpu_rates.py run --minutes 9 --out OUT
"""


def _llama(layers: int, hidden: int, intermediate: int, heads: int, groups: int) -> dict[str, Any]:
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate}
    return {"preset": "llama-tiny", **shape, "num_attention_heads": heads, "num_key_value_heads": groups}


@dataclass(frozen=True)
class Size:
    """A model, how long it is trained, and the base rates that are tried: D-Muon's, and the others' in units of them."""

    model: Mapping[str, Any]
    steps: int
    batch_size: int
    seq_len: int
    rates: tuple[float, float, float, float]
    seconds: float  # of a run on one H100, guessed until one has been made


SIZES: Final[Mapping[str, Size]] = {
    "llama-26m": Size(_llama(6, 512, 1408, 8, 4), 600, 32, 512, (0.001, 0.002, 0.004, 0.008), 30.0),
    "llama-126m": Size(_llama(16, 768, 2048, 12, 12), 600, 32, 512, (0.0005, 0.001, 0.002, 0.004), 75.0),
}
SMALL: Final[Mapping[str, Size]] = {
    "llama-nothing": Size(_llama(1, 16, 16, 2, 1), 3, 2, 16, (0.001, 0.002, 0.004, 0.008), 1.0)
}
#: A contender's rates over D-Muon's, from what the small models wanted.
IN_UNITS: Final = {"DualMuon": 2.0, "D-Muon": 1.0, "LANTON": 2.0, "AdamW": 0.25}


def settings(name: str, size: Size) -> list[list[Trial]]:
    """For each contender the trials that it is tuned by, on the first seed."""
    tuned = []
    for factor in (2.0, 4.0):
        roles = tuple(dict.fromkeys(LLAMA_ROLES, factor).items())
        tuned += [Trial(name, "D-Muon", lr, SEEDS[0], size.steps, roles) for lr in size.rates[1:3]]
    alone = [
        [Trial(name, contender, unit * lr, SEEDS[0], size.steps) for lr in size.rates]
        for contender, unit in IN_UNITS.items()
    ]
    return [alone[0], tuned, *alone[1:]]


def due(sizes: Mapping[str, Size], rows: Sequence[Mapping[str, Any]]) -> Iterator[Trial]:
    """What is missing: every setting on the first seed, then of each contender the best one on the others."""
    known = [(row["trial"], row["loss"]) for row in rows]

    def loss(trial: Trial) -> float | None:
        """None where it is missing, infinite where it diverged."""
        found = [math.inf if value is None else value for done, value in known if done == as_row(trial)]
        return found[0] if found else None

    for name, size in sizes.items():
        for trials in settings(name, size):
            yield from (trial for trial in trials if loss(trial) is None)
        for trials in settings(name, size):
            losses = {trial: value for trial in trials if (value := loss(trial)) is not None}
            if len(losses) == len(trials):
                best = min(losses, key=losses.__getitem__)
                others = (replace(best, seed=seed) for seed in SEEDS[1:])
                yield from (trial for trial in others if loss(trial) is None)


def configuration(trial: Trial, size: Size, tokens: Path) -> Config:
    """The lab's config of a trial."""
    optimizer = {**CONTENDERS[trial.contender], "lr": trial.lr, "role_factors": dict(trial.roles)}
    return Config.model_validate({
        "model": size.model,
        "data": {"source": "tokens", "paths": [str(tokens)], "seq_len": size.seq_len, "validation_fraction": 0.02},
        "training": {"steps": trial.steps, "seed": trial.seed, "batch_size": size.batch_size, "precision": "bf16"},
        "optimizer": optimizer,
    })  # fmt: skip


def run(store: Store, sizes: Mapping[str, Size], tokens: Path, device: str, minutes: float) -> None:
    """As many runs as are over in time."""
    deadline, began = 60 * minutes, time.perf_counter()
    while (trial := next(due(sizes, store.results()), None)) is not None:
        size = sizes[trial.model]
        walls = [row["wall"] for row in store.results() if row["trial"]["model"] == trial.model]
        needed = 1.2 * max(walls, default=size.seconds)
        if time.perf_counter() - began + needed > deadline:
            print(f"{sum(1 for _ in due(sizes, store.results()))} or more runs are left: call it again")
            return
        started = time.perf_counter()
        result = fit(configuration(trial, size, tokens), device=device)
        store.add(trial, {**result, "wall": round(time.perf_counter() - started, 1), **named(device)})
        print(trial, result["loss"], flush=True)
    print("nothing is left")


def named(device: str) -> dict[str, str]:
    """The device, for the record."""
    return {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}


def prepare(folder: Path, sources: Sequence[Path], characters: int, vocabulary: int) -> None:
    """Python files below `sources`, in an order that has nothing to do with their names, as one row of token ids."""

    def order(path: Path) -> str:
        return hashlib.sha256(path.name.encode() + str(path.stat().st_size).encode()).hexdigest()

    texts: list[str] = []
    files = {path for source in sources for path in source.rglob("*.py")}
    for path in sorted(files, key=lambda path: (order(path), path)):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        characters -= len(texts[-1])
        if characters <= 0:
            break
    tokenizer = trained_bpe(iter(texts), vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.concatenate(bpe_ids(tokenizer, texts)).astype(np.uint16)
    np.save(folder / "tokens.npy", ids)
    print(f"{len(ids):,} tokens of {len(texts):,} files.", PACKING.format(megabytes=ids.nbytes / 1e6))


def page(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown, as of the rate rule's runs on a processor."""
    devices = sorted({f"{row['device']}, torch {row['torch']}" for row in rows})
    lines = [
        "# The rate rule on a GPU",
        "",
        f"`python benchmarks/gpu_rates.py run`, on {'; '.join(devices)}.",
        "",
    ]
    for (model, steps), found in rate_rule_table.losses(rows).items():
        lines += rate_rule_table.section(model, steps, found, rows)
    return [*lines, f"The table was made on: {machine.line()}"]


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("command", choices=("prepare", "run", "table"))
    parser.add_argument("--minutes", type=float, default=9.0, help="that a call may take")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU gets through in seconds")
    parser.add_argument("--sources", nargs="+", type=Path, help="of the text; the library and packages of this Python")
    parser.add_argument("--characters", type=int, default=CHARACTERS, help="of it at most")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the token ids")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args()
    if given.command == "prepare":
        sources = given.sources or [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
        prepare(given.build, sources, given.characters, given.vocabulary)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    store = Store(given.out / "gpu_rates.jsonl")
    if given.command == "run":
        if given.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU; --device cpu --small is the dry run")
        run(store, SMALL if given.small else SIZES, given.build / "tokens.npy", given.device, given.minutes)
    rows = store.results()
    write_page(given.out / "gpu_rates.md", page(rows))


if __name__ == "__main__":
    main()
