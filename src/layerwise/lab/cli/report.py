"""`layerwise report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from layerwise.lab.cli.words import command_line


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
