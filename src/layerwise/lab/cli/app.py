"""The command line as a whole: its commands, and how it ends."""

from __future__ import annotations

import io
import shlex
import sys
import time
from typing import Annotated

import typer

from layerwise import __version__
from layerwise.errors import LayerwiseError
from layerwise.lab.cli import check, compare, sweep, train
from layerwise.lab.training import processes

#: The exit code that typer makes of Ctrl-C (128 + SIGINT), and all that is seen of it here.
INTERRUPTED = 130

app = typer.Typer(
    help="Learning rates layer by layer: train models with them, compare optimizers, measure and carry over rates.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=train.NAMES)(train.train)
app.command()(compare.compare)
app.command()(compare.report)
app.command()(train.record)
app.command()(sweep.sweep)
app.command()(check.check)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"layerwise {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand != "train":
        processes.refuse_several(f"layerwise {context.invoked_subcommand}")


def run(arguments: list[str] | None = None) -> None:
    """Runs a command. A LayerwiseError, or a disk that fails, is one line on standard error and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without "±" shows "?", and the work is not lost
            stream.reconfigure(errors="replace")
    try:
        app(given, prog_name="layerwise", standalone_mode=True)
    except (LayerwiseError, OSError, MemoryError) as error:
        if rank := processes.rank():
            time.sleep(5)  # what the first process says too is said once: its launcher ends the others
        where = f" (process {rank})" if rank else ""
        print(f"layerwise{where}: {_line(error)}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            print(f"layerwise: interrupted; what is finished is kept, {_way_on(given)}", file=sys.stderr)
        raise


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, LayerwiseError):
        what = f"{error.filename}: " if error.filename else ""
        return f"{what}{error.strerror or error}; what was written before is kept"
    if isinstance(error, MemoryError):
        return f"out of memory ({error}): a smaller model or batch needs less"
    return str(error)


def _way_on(given: list[str]) -> str:
    """How the command that was interrupted goes on."""
    if given[:1] == ["train"]:  # which may not have come to a checkpoint, or not even to its folder
        options = ("--resume", "--or-start")
        given = [*(word for word in given if word not in (*options, "--overwrite")), *options]
    return f"{shlex.join(['layerwise', *given])} goes on"
