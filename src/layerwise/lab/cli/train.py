"""`layerwise train` and `layerwise record`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from layerwise.errors import LayerwiseError
from layerwise.lab.cli.words import Words, seeds_of, split_words
from layerwise.lab.config.load import load_config
from layerwise.lab.config.schema import Config
from layerwise.lab.models.families import PRESETS
from layerwise.lab.optimizers.registry import optimizers
from layerwise.lab.runs.directory import check_output, has_ended
from layerwise.lab.runs.recorded import Run, number
from layerwise.lab.training import processes

#: At the end of its help.
NAMES = f"Models: {', '.join(PRESETS)}.\n\nOptimizers: {', '.join(optimizers())}."


def train(
    words: Words = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with this run from its last checkpoint, bit for bit.")
    ] = False,
    or_start: Annotated[
        bool, typer.Option("--or-start", help="With --resume: start at step 0 where there is no checkpoint yet.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run of the same name.")] = False,
    match: Annotated[
        str | None, typer.Option(help="Match rates to a file of `layerwise record`, or `uniform` (function_space.match).")
    ] = None,
) -> None:
    """Train one model.

    CONFIG is a YAML file, or the folder of an earlier run, whose config is taken; without it the built-in run is
    trained: a small GPT-2 on the Python standard library's source. Any key can be set on the command line:

        layerwise train optimizer=lanton optimizer.lr=4e-3 model.n_layer=2 training.steps=100

    All keys are in docs/configuration.md.
    """
    from layerwise.lab.training.run import train as run_training

    path, overrides = split_words(words)
    if match is not None:
        overrides.append(f"function_space.match={match}")
    config: Config = load_config(path, overrides)
    ended = resume and not overwrite and has_ended(config.run_path)
    run = run_training(config, resume=resume, or_start=or_start, overwrite=overwrite)
    processes.leave()
    if run.status == "diverged":
        raise LayerwiseError(f"run {run.path} diverged: {run.result.get('reason')}; lower optimizer.lr")
    if processes.rank() == 0:
        print(_summary(run, " had finished before" if ended else ""))


def _summary(run: Run, had_finished: str) -> str:
    """How a run ended, in a line. Raises LayerwiseError where run.json does not say."""
    wanted = ("steps", "tokens", "seconds", "tokens_per_second", "loss", "val_loss")
    result = {key: number(run.result.get(key)) for key in wanted}
    if missing := [key for key, value in result.items() if not math.isfinite(value)]:
        raise LayerwiseError(
            f"run {run.path} is {run.status}, and run.json does not say with which {', '.join(missing)} (under result):"
            " it was damaged; `layerwise report` shows what there is"
        )
    return (
        f"{run.name}{had_finished}: {result['steps']:.0f} steps, {result['tokens']:,.0f} {run.counted} in"
        f" {result['seconds']:.0f} s ({result['tokens_per_second']:,.0f} {run.counted}/s), loss {result['loss']:.4f},"
        f" validation loss {result['val_loss']:.4f} nats per {run.counted[:-1]}; written to {run.path}"
    )


def record(
    words: Words = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path("base.json"),
    seeds: Annotated[str, typer.Option(help="Seeds the rates are averaged over.")] = "0,1,2,3",
) -> None:
    """Record the function-space rates of a small model as a base file.

    A large model takes them over: `layerwise train LARGE --match base.json`. Only the steps that are matched are trained:
    one, unless `function_space.match_step` or `match_every` say otherwise.
    """
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
