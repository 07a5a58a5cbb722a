"""The commands `layerwise compare` and `layerwise report`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerwise.errors import LayerwiseError

if TYPE_CHECKING:
    from layerwise.lab.experiments.comparison import Comparison

COMPARE_HELP = """Train the same model with several optimizers, and compare them.

Every contender starts from the same weights and sees the same batches. Ends with a table and a page,
`runs/compare/report.html`. Runs that have ended are not repeated, interrupted ones go on.

    layerwise compare
    layerwise compare --optimizers adamw,lanton training.steps=1000
    layerwise compare --lr-grid auto --seeds 3

CONFIG is a YAML file as for `layerwise train`, without an optimizer; a section `compare` may hold `optimizers`, `seeds`,
`lr_grid: {lanton: [2e-3, 4e-3, 8e-3]}`, and `contenders: {mine: {name: lanton, momentum: 0.9}}`.
"""


def register(app: typer.Typer) -> None:
    """Add both commands to the command line."""
    app.command(help=COMPARE_HELP)(compare)
    app.command()(report)


def compare(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="CONFIG KEY=VALUE", help="A config and overrides.")
    ] = None,
    optimizers: Annotated[
        str | None, typer.Option("--optimizers", metavar="A,B,C", help="Contenders, separated by commas.")
    ] = None,
    lr_grid: Annotated[
        str | None,
        typer.Option(
            "--lr-grid", metavar="auto | NAME=[R,R]", help="Tune: `auto`, or rates as `lanton=[2e-3, 4e-3]`."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Runs of each contender.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the report; the comparison's own by default."),
    ] = None,
) -> None:
    from layerwise.lab.cli import split_words
    from layerwise.lab.config.read import load_config
    from layerwise.lab.experiments.comparison import CompareConfig, curve_rows, rates_file
    from layerwise.lab.experiments.comparison import compare as run_comparison
    from layerwise.lab.report import Story, write_report

    path, overrides = split_words(words or [])
    if optimizers is not None:
        names = [name.strip() for name in optimizers.split(",") if name.strip()]
        if not names:
            raise LayerwiseError(f"--optimizers {optimizers!r}: name one or more, such as adamw,lanton")
        overrides.append(f"compare.optimizers=[{', '.join(names)}]")
    if lr_grid is not None:
        overrides.append(f"compare.lr_grid.{lr_grid}" if "=" in lr_grid else f"compare.lr_grid={lr_grid}")
    if seeds is not None:
        overrides.append(f"compare.seeds={seeds}")
    config = load_config(path, overrides, CompareConfig)
    comparison = run_comparison(config, say=_say)
    command = shlex.join(["layerwise", *sys.argv[1:]])
    story = Story(
        title="Comparison of optimizers",
        notes=comparison.notes,
        command=command,
        grid=comparison.curves if comparison.tuned else (),
        grid_rows=curve_rows(comparison) if comparison.tuned else (),
    )
    page = write_report(comparison.contenders, output or config.folder, story)
    rates = rates_file(config, comparison, command)
    if rates is not None:
        (config.folder / "base_rates.yaml").write_text(rates, encoding="utf-8")
    print_table(comparison)
    _say(f"report: {page}")


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Run directories, or folders of runs.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write to; by default that of the first run."),
    ] = None,
    title: Annotated[str, typer.Option("--title", help="Title of the page.")] = "Training report",
) -> None:
    """Write a page with the figures and tables of runs: report.html, and its figures as files beside it."""
    from layerwise.lab.report import Story, contenders, load_runs, write_report

    if not runs:
        raise LayerwiseError(
            "report: no run was named; name one run directory or more, such as runs/gpt2-tiny-lanton"
        )
    notes: list[str] = []
    found = load_runs(runs, notes.append)
    for note in notes:
        print(note, file=sys.stderr)
    command = shlex.join(["layerwise", *sys.argv[1:]])
    page = write_report(contenders(found), output or runs[0], Story(title, notes, command))
    _say(f"report: {page}")


def print_table(comparison: Comparison) -> None:
    """The result as a table on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from layerwise.lab.report.tables import result_rows

    rows = result_rows(comparison.contenders)
    several = any(row.seeds > 1 for row in rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0 if several else 1), pad_edge=False)  # 80 columns hold it
    table.add_column("optimizer")
    for name in (
        "base rate",
        "val. loss",
        *(("spread", "seeds") if several else ()),
        "tokens",
        "time",
        "tokens/s",
    ):
        table.add_column(name, justify="right")
    table.add_column("status")
    for row in rows:
        spread: tuple[Any, ...] = (row.spread, str(row.seeds)) if several else ()
        cells = (row.label, row.lr, row.final, *spread, row.tokens, row.seconds, row.speed, row.status)
        table.add_row(*cells, style="bold" if row.leads else None)
    console = Console()
    console.print(table)
    for note in comparison.notes:
        console.print(note, style="yellow", highlight=False, markup=False)


def _say(text: str) -> None:
    print(text, flush=True)
