"""`layerwise record`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwise.lab.cli.words import Words, seeds_of, split_words
from layerwise.lab.config.load import load_config
from layerwise.lab.config.schema import Config


def record(
    words: Words = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path("base.json"),
    seeds: Annotated[str, typer.Option(help="Seeds the rates are averaged over.")] = "0,1,2,3",
) -> None:
    """Record the function-space rates of a small model as a base file.

    A large model takes them over: `layerwise train LARGE --match base.json`. Only the steps that are matched are trained:
    one, unless `function_space.match_step` or `match_every` say otherwise.
    """
    from layerwise.lab.runs.directory import check_output
    from layerwise.lab.training.run import record as run_recording

    path, overrides = split_words(words)
    config: Config = load_config(path, overrides)
    chosen = seeds_of(seeds)
    check_output(output, '"fingerprint"')
    base = run_recording(config, chosen)
    output.parent.mkdir(parents=True, exist_ok=True)
    base.save(output)
    for step, rates in base.records.items():
        total = sum(rate.value for rate in rates.values())
        print(f"step {step + 1}: {len(rates)} rates, sum {total:.4g} (RMS change of {base.fingerprint.space})")
    print(f"written to {output}")
