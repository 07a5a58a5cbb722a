"""Writes numbers.json beside this file, or compares with it: README.md has the commands."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import golden_function_space
import lab_runs_alone
import optimizer_runs
import process_runs
import torch
from fingerprint import digest, machine

FILE = Path(__file__).with_name("numbers.json")
PARTS = ("optimizers", "function_space", "processes", "lab")


def part_numbers(part: str) -> dict[str, Any]:
    """All runs of one part by name."""
    torch.set_num_threads(1)
    if part == "optimizers":
        return {f"{run}, {dtype}": optimizer_runs.run(run, dtype) for run, dtype in optimizer_runs.names()}
    if part == "function_space":
        kinds = {
            "measured": golden_function_space.measured,
            "recorded": golden_function_space.records,
            "matched": golden_function_space.matchings,
        }
        return {
            f"{name}, {dtype}": digest(json.dumps(found, sort_keys=True))
            for dtype in golden_function_space.DTYPES
            for kind, numbers in kinds.items()
            for name, found in _named(kind, numbers(dtype))
        }
    if part == "processes":
        return process_runs.run()
    with tempfile.TemporaryDirectory() as folder:
        return {name: lab_runs_alone.whole(Path(folder), name) for name in lab_runs_alone.RUNS}


def _named(kind: str, found: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{kind}: {name}", numbers) for name, numbers in found.items()]


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of the runs whose numbers are not those expected, or that are in one only."""
    return [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]


def keep_checkpoints(folder: Path) -> None:
    """The middle of every run, as this version writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for run, dtype in optimizer_runs.names():
        optimizer_runs.saved(run, dtype, folder / f"{run}, {dtype}.pt")
    for name in lab_runs_alone.RUNS:
        lab_runs_alone.killed(folder, name)


def resumed_numbers(part: str, folder: Path) -> dict[str, Any]:
    """The ends of all runs of a part whose middles are kept in the folder."""
    if part == "lab":
        return {name: lab_runs_alone.resumed(folder, name) for name in lab_runs_alone.RUNS}
    return {
        f"{run}, {dtype}": optimizer_runs.resumed(run, dtype, folder / f"{run}, {dtype}.pt")
        for run, dtype in optimizer_runs.names()
    }


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--only", choices=PARTS, action="append", help="this part; again for more")
    options.add_argument("--file", type=Path, default=FILE)
    options.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    options.add_argument("--checkpoints", type=Path, help="keep checkpoints of the middles in this folder")
    options.add_argument("--resume", action="store_true", help="go on from the checkpoints kept there, and compare")
    given = options.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if given.resume:
        for part in given.only or ("optimizers", "lab"):
            compare(given.file, {part: resumed_numbers(part, given.checkpoints)})
    elif given.checkpoints:
        keep_checkpoints(given.checkpoints)
    else:
        found = {part: timed(part) for part in given.only or PARTS}
        if given.check:
            compare(given.file, found)
        else:
            kept = json.loads(given.file.read_text()) if given.file.exists() else {}
            given.file.write_text(as_text(kept | {"machine": machine()} | found))


def as_text(numbers: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each run."""
    parts = (
        f'"{part}": {{\n'
        + ",\n".join(f"{json.dumps(run)}: {json.dumps(found, sort_keys=True)}" for run, found in runs.items())
        + "\n}"
        for part, runs in sorted(numbers.items())
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def timed(part: str) -> dict[str, Any]:
    began = time.perf_counter()
    found = part_numbers(part)
    print(f"{part}: {len(found)} runs, {time.perf_counter() - began:.0f} s", flush=True)
    return found


def compare(file: Path, found: dict[str, dict[str, Any]]) -> None:
    expected = json.loads(file.read_text())
    if expected["machine"] != machine():
        raise SystemExit(f"the file is of {expected['machine']}, this is {machine()}: the last bits differ")
    for part, numbers in found.items():
        print(f"{part} differ:", differences(expected[part], numbers) or "none", flush=True)


if __name__ == "__main__":
    main()
