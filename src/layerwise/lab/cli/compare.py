"""`layerwise compare` and `layerwise report`."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from layerwise.common.text_table import aligned, titled
from layerwise.errors import LayerwiseError
from layerwise.lab.cli.words import Words, command_line, split_words
from layerwise.lab.config.load import load_config


def compare(
    words: Words = None,
    optimizers: Annotated[
        str | None, typer.Option("--optimizers", metavar="A,B,C", help="Contenders, separated by commas.")
    ] = None,
    lr_grid: Annotated[
        str | None, typer.Option("--lr-grid", metavar="auto | NAME=[R,R]", help="Tune: `auto`, or `lanton=[2e-3, 4e-3]`.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Runs of each contender.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the report; the comparison's own by default.")
    ] = None,
) -> None:
    """Train the same model with several optimizers, and compare them.

    Every contender starts from the same weights and sees the same batches. Ends with a table and a page,
    `runs/compare/report.html`. Runs that have ended are not repeated, interrupted ones go on.

        layerwise compare
        layerwise compare --optimizers adamw,lanton training.steps=1000
        layerwise compare --lr-grid auto --seeds 3

    CONFIG is a YAML file as for `layerwise train`, without an optimizer; a section `compare` may hold `optimizers`, `seeds`,
    `lr_grid: {lanton: [2e-3, 4e-3, 8e-3]}`, and `contenders: {mine: {name: lanton, momentum: 0.9}}`.
    Equal budgets, and tuning by role: `trials: 9`,
    `roles: {head: [2, 4], vector: [0.5, 2]}`, `by_role: [d-muon]`. All keys: docs/configuration.md.
    """
    from layerwise.lab.experiments.comparison import compare as run_comparison
    from layerwise.lab.experiments.contenders import CompareConfig
    from layerwise.lab.report.page import check_report, write_report
    from layerwise.lab.report.tables import result_rows

    path, overrides = split_words(words)
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
    folder = output or config.run_path
    check_report(folder)
    found, story = run_comparison(config, say=partial(print, flush=True))
    page = write_report(found, folder, replace(story, command=command_line()))
    for rows in ([row.cells for row in result_rows(found)], story.standings):
        if rows:
            print(*aligned(titled(rows), right=range(1, len(rows[0]))), sep="\n")
    print(*story.notes, f"report: {page}", sep="\n", flush=True)


def report(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN...", help="Run directories, or folders of runs.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write to; by default that of the first run.")
    ] = None,
) -> None:
    """Write a page with the figures and tables of runs: report.html, and its figures as files beside it."""
    from layerwise.lab.report import Story, contenders, load_runs, write_report

    notes: list[str] = []
    found = load_runs(runs := runs or [], notes.append)
    for note in notes:
        print(note, file=sys.stderr)
    page = write_report(contenders(found), output or runs[0], Story("Training report", notes, command_line()))
    print(f"report: {page}")
