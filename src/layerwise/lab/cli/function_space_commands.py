"""The commands of function-space rates: `record`, `sweep`, `check`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from layerwise.errors import LayerwiseError
from layerwise.lab.config.read import load_config

if TYPE_CHECKING:
    from layerwise.lab.config.schema import Config
    from layerwise.lab.experiments.sweep.engines import Engine
    from layerwise.lab.models.sizes import Axis

Words = Annotated[
    list[str] | None, typer.Argument(metavar="CONFIG KEY=VALUE", help="A config and overrides.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command(help=_RECORD)(record)
    app.command(help=_SWEEP)(sweep)
    app.command(help=_CHECK)(check)


def _words(words: list[str] | None) -> tuple[str | None, list[str]]:
    from layerwise.lab.cli import split_words  # which imports this module

    return split_words(words or [])


def numbers(text: str, option: str) -> list[float]:
    """`64,128,256` as numbers. Raises LayerwiseError."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        raise LayerwiseError(
            f"{option} {text!r}: write numbers with commas between them, such as 64,128"
        ) from None
    if not all(map(math.isfinite, found)):
        raise LayerwiseError(f"{option} {text!r}: write finite numbers, such as 64,128")
    return found


def seeds_of(text: str) -> list[int]:
    """`0,1` as seeds: whole numbers, each once, as a mean over seeds would count one twice. Raises LayerwiseError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise LayerwiseError(
            f"--seeds {text!r}: write whole numbers from 0 with commas between them, such as 0,1"
        )
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        raise LayerwiseError(f"--seeds {text!r}: a seed stands there twice; write each once, such as 0,1")
    return seeds


_RECORD = """Record the function-space rates of a small model as a base file.

A large model takes them over: `layerwise train LARGE --match base.json`. Only the steps that are matched are trained:
one, unless `function_space.match_step` or `match_every` say otherwise.
"""


def record(
    words: Words = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The base file to write.")] = Path(
        "base.json"
    ),
    seeds: Annotated[str, typer.Option(help="Seeds the rates are averaged over.")] = "0,1,2,3",
) -> None:
    from layerwise.lab.experiments.record_base import check_output
    from layerwise.lab.experiments.record_base import record as run_recording

    path, overrides = _words(words)
    config: Config = load_config(path, overrides)
    chosen = seeds_of(seeds)
    check_output(output)
    base = run_recording(config, chosen)
    base.save(output)
    for step, rates in base.records.items():
        total = sum(rate.value for rate in rates.values())
        print(
            f"step {step + 1}: {len(rates)} rates, sum {total:.4g} (RMS change of {base.fingerprint.space})"
        )
    print(f"written to {output}")


_SWEEP = """Sweep learning rates over sizes of a model, and show whether the best one carries over.

CONFIG is a training config with a section `sweep`: what the sizes are, the grid of rates, the methods (standard, flerm,
uniform, mup) and the seeds. Finished trials are never repeated: run the same command again to go on, or with more rates
or sizes to add them, under either engine. The folder `run.dir/run.name` holds results.jsonl, the transfer figure and the
table. Exit code 1: some trials died and gave no result.
"""


def sweep(
    words: Words = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Where trials run: this machine, or a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Trials side by side, one thread each (default 2; ray: as many as fit); 0: in this process."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="ray: a running cluster, or `auto`; else RAY_ADDRESS, else Ray is started here for the sweep."
        ),
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(help="ray: cores, and threads, of a trial (default 1).")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(help="ray: GPUs of a trial, such as 0.25 (default 0: it sees none).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many trials there are, and stop.")
    ] = False,
) -> None:
    from rich.console import Console

    from layerwise.lab.experiments.sweep.results import read_results
    from layerwise.lab.experiments.sweep.run_sweep import RESULTS, run_sweep
    from layerwise.lab.experiments.sweep.sweep_config import SweepConfig
    from layerwise.lab.experiments.sweep.sweep_report import write_report
    from layerwise.lab.experiments.sweep.table import terminal
    from layerwise.lab.experiments.sweep.trial_plan import make_plan

    path, overrides = _words(words)
    config = load_config(path, overrides, SweepConfig)
    if dry_run:
        trials = make_plan(config).trials
        done = read_results(config.run_path / RESULTS)
        left = sum(id not in done for id in trials)
        print(f"{config.run_name}: {len(trials)} trials, {left} of them to run, in {config.run_path}")
        return
    swept = run_sweep(config, _engine(engine, workers, address=address, cpus=cpus, gpus=gpus))
    if swept.failures and not read_results(swept.folder / RESULTS):
        raise LayerwiseError(
            f"all {len(swept.failures)} trials died, the last of: {list(swept.failures.values())[-1]}"
        )
    rows = write_report(config, swept.folder)
    Console().print(terminal(rows, config.sweep.axis))
    if any(row.edge for row in rows):
        print(
            "! the best rate is an end of its grid: the optimum may lie beyond it; widen sweep.lr or sweep.lr_of"
        )
    print(f"figure and table: {swept.folder / 'transfer.png'}, {swept.folder / 'table.md'}")
    if swept.failures:
        count = f"{len(swept.failures)} trials died" if len(swept.failures) > 1 else "a trial died"
        print(
            f"layerwise: {count} and gave no result (above); the same command runs them again",
            file=sys.stderr,
        )
        raise typer.Exit(1)


def _engine(name: str, workers: int | None, **ray_options: Any) -> Engine:
    """The engine that the options ask for. Raises LayerwiseError for options of another one."""
    given = {key: value for key, value in ray_options.items() if value is not None}
    if name == "ray":
        from layerwise.lab.experiments.sweep.engines.ray import RayEngine

        return RayEngine(workers=workers, **given)
    from layerwise.lab.experiments.sweep.engines.this_machine import LocalEngine

    if given:
        raise LayerwiseError(f"--{next(iter(given))} is an option of --engine ray")
    return LocalEngine() if workers is None else LocalEngine(workers)


_CHECK = """Check in seconds whether the layers' updates change the outputs as much at every size.

The model takes a step at each size; the slope of each parameter's function-space rate against the size says whether
one learning rate fits all. Exit code 0: every slope is within the tolerance, as far as its standard error can tell; 1:
some are not.
"""


def check(
    words: Words = None,
    widths: Annotated[str | None, typer.Option(help="Hidden sizes, such as 64,128,256.")] = None,
    depths: Annotated[str | None, typer.Option(help="Numbers of blocks, instead of widths.")] = None,
    match: Annotated[
        str | None,
        typer.Option(
            help="Match rates to a base file, `uniform`, or `first` (the first size); default: what the config says."
        ),
    ] = None,
    step: Annotated[int, typer.Option(help="The optimizer step to measure.")] = 1,
    seeds: Annotated[str, typer.Option(help="Seeds the rates are averaged over.")] = "0,1",
    tolerance: Annotated[float, typer.Option(help="Largest slope that counts as flat.")] = 0.2,
) -> None:
    from rich.console import Console

    from layerwise.lab.experiments.check_sizes import check_sizes, terminal

    axis: Axis
    if widths is not None and depths is not None:
        raise LayerwiseError(
            f"--widths {widths} and --depths {depths}: check changes one of them at a time; give one"
        )
    if widths is not None:
        axis, sizes = "width", numbers(widths, "--widths")
    elif depths is not None:
        axis, sizes = "depth", numbers(depths, "--depths")
    else:
        raise LayerwiseError("check needs --widths or --depths, such as --widths 64,128,256")
    path, overrides = _words(words)
    found = check_sizes(
        load_config(path, overrides),
        sizes,
        axis=axis,
        match=match,
        step=step,
        seeds=seeds_of(seeds),
        tolerance=tolerance,
    )
    Console().print(terminal(found))
    uneven = [trend for trend in found.trends if not trend.flat(tolerance)]
    if uneven:
        print(f"{len(uneven)} of {len(found.trends)} rates change with the size (slope beyond {tolerance:g})")
        raise typer.Exit(1)
    print(f"all {len(found.trends)} rates are flat (slope within {tolerance:g})")
