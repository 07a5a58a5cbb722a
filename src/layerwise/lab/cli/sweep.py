"""`layerwise sweep`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from layerwise.common.text_table import aligned
from layerwise.errors import LayerwiseError
from layerwise.lab.cli.words import Words, split_words
from layerwise.lab.config.load import load_config
from layerwise.lab.experiments.sweep.engines import Engine, LocalEngine, RayEngine

if TYPE_CHECKING:
    from layerwise.lab.experiments.sweep.run_sweep import SweepConfig


def sweep(
    words: Words = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Where trials run: this machine, or a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Trials at a time (default 2; ray: as many as fit); 0: in this process.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="ray: of a running cluster, or `auto`; default: RAY_ADDRESS, or Ray started here.")
    ] = None,
    cpus: Annotated[float | None, typer.Option(help="ray: cores, and threads, of a trial (default 1).")] = None,
    gpus: Annotated[float | None, typer.Option(help="ray: GPUs of a trial, such as 0.25 (default 0: it sees none).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many trials there are, and stop.")] = False,
) -> None:
    """Sweep learning rates over sizes of a model, and show whether the best one carries over.

    CONFIG is a training config with a section `sweep`: what the sizes are, the grid of rates, the methods (standard, flerm,
    uniform, mup) and the seeds. Finished trials are never repeated: run the same command again to go on, or with more rates
    or sizes to add them, under either engine. The folder `run.dir/run.name` holds results.jsonl, the transfer figure and the
    table. Exit code 1: some trials died and gave no result.
    """
    from layerwise.lab.experiments.sweep.run_sweep import SweepConfig, run_sweep

    path, overrides = split_words(words)
    config = load_config(path, overrides, SweepConfig)
    chosen = _engine(engine, workers, address=address, cpus=cpus, gpus=gpus)
    _say_plan(config)
    if not dry_run:
        _report(config, list(run_sweep(config, chosen).values()))


def _say_plan(config: SweepConfig) -> None:
    """Says what is to be run. Raises LayerwiseError where it cannot be."""
    from layerwise.lab.experiments.sweep.run_sweep import check_folder, make_plan, read_results

    check_folder(config.run_path)
    plan, sweep = make_plan(config), config.sweep
    done = read_results(config.run_path)
    left = sum(id not in done for id in plan.trials)
    sizes = ", ".join(f"{size:g}" for size in sweep.sizes)
    seeds = f"{len(sweep.seeds)} seed{'s' if len(sweep.seeds) > 1 else ''}"
    print(
        f"{config.run_name}: {len(plan.trials)} trials, {left} of them to run, in {config.run_path}\n"
        f"  {sweep.axis} {sizes}; methods {', '.join(sweep.methods)}; {len(sweep.lr)} rates; {seeds};"
        f" {config.training.steps} steps each",
        flush=True,
    )


def _report(config: SweepConfig, reasons: list[str]) -> None:
    """Figure and table of what there is, and exit code 1 where a trial died, for these reasons."""
    from layerwise.lab.experiments.sweep.run_sweep import read_results
    from layerwise.lab.experiments.sweep.sweep_report import cells, titles, write_report

    folder = config.run_path
    if reasons and not read_results(folder):
        raise LayerwiseError(f"all {len(reasons)} trials died, the last of: {reasons[-1]}")
    rows = write_report(config)
    columns = titles(config.sweep.axis)
    print(*aligned([columns, *map(cells, rows)], right=range(1, len(columns))), sep="\n")
    if any(row.edge for row in rows):
        print("! the best rate is an end of its grid: the optimum may lie beyond; widen sweep.lr or sweep.lr_of")
    print(f"figure and table: {folder / 'transfer.png'}, {folder / 'table.md'}")
    if reasons:
        count = f"{len(reasons)} trials died" if len(reasons) > 1 else "a trial died"
        print(f"layerwise: {count} and gave no result (above); the same command runs them again", file=sys.stderr)
        raise typer.Exit(1)


def _engine(name: str, workers: int | None, **ray_options: Any) -> Engine:
    """The engine that the options ask for. Raises LayerwiseError for options of another one."""
    given = {key: value for key, value in ray_options.items() if value is not None}
    if name == "ray":
        return RayEngine(workers=workers, **given)
    if given:
        raise LayerwiseError(f"--{next(iter(given))} is an option of --engine ray")
    return LocalEngine() if workers is None else LocalEngine(workers)
