"""The command line: `layerwise train`, and the commands of the other modules of the lab."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from layerwise import __version__
from layerwise.errors import LayerwiseError
from layerwise.lab.config.read import load_config
from layerwise.lab.config.schema import Config
from layerwise.lab.models.families import PRESETS
from layerwise.lab.optimizers.registry import OPTIMIZERS
from layerwise.lab.runs.directory import has_ended
from layerwise.lab.training import processes

app = typer.Typer(
    help="Layerwise learning rates: train and compare language models with noise-adaptive layer rates.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


#: The exit code that typer makes of Ctrl-C (128 + SIGINT), and all that is seen of it here.
INTERRUPTED = 130


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


def _is_there(word: str) -> bool:
    """Whether a word names a file or folder; one too long for a name does not."""
    try:
        return Path(word).exists()
    except OSError:
        return False


def split_words(words: list[str]) -> tuple[str | None, list[str]]:
    """`[CONFIG] [key=value...]` told apart: a word with `=` is an override, the one without is the config."""
    overrides = [word for word in words if "=" in word and not _is_there(word)]
    configs = [word for word in words if word not in overrides]
    if len(configs) > 1:
        raise LayerwiseError(f"one config at most, got {', '.join(configs)}; overrides are written key=value")
    return (configs[0] if configs else None), overrides


_TRAIN_HELP = """Train one model.

CONFIG is a YAML file, or the folder of an earlier run, whose config is taken; without it the built-in run is
trained: a small GPT-2 on the Python standard library's source. Any key can be set on the command line:

    layerwise train optimizer=lanton optimizer.lr=4e-3 model.n_layer=2 training.steps=100

Models: {models}.

Optimizers: {optimizers}.

All keys are in docs/configuration.md.
"""


@app.command(help=_TRAIN_HELP.format(models=", ".join(PRESETS), optimizers=", ".join(OPTIMIZERS)))
def train(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="CONFIG KEY=VALUE", help="A config and overrides.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with this run from its last checkpoint, bit for bit.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run of the same name.")
    ] = False,
    match: Annotated[
        str | None,
        typer.Option(
            help="Match layer rates to a file of `layerwise record`, or `uniform` (function_space.match)."
        ),
    ] = None,
) -> None:
    from layerwise.lab.training.run import train as run_training

    path, overrides = split_words(words or [])
    if match is not None:
        overrides.append(f"function_space.match={match}")
    config: Config = load_config(path, overrides)
    ended = resume and not overwrite and has_ended(config.run_path)
    run = run_training(config, resume=resume, overwrite=overwrite)
    processes.leave()
    if run.status == "diverged":
        raise LayerwiseError(f"run {run.path} diverged: {run.result.get('reason')}; lower optimizer.lr")
    if processes.rank() > 0:
        return
    result = run.result
    print(
        f"{run.name}{' had finished before' if ended else ''}: {result['steps']} steps,"
        f" {result['tokens']:,} tokens in {result['seconds']:.0f} s"
        f" ({result['tokens_per_second']:,.0f} tokens/s), loss {result['loss']:.4f},"
        f" validation loss {result['val_loss']:.4f} nats per token; written to {run.path}"
    )


def _register_others() -> None:
    """Commands of other modules: each has `register(app)`."""
    for name in ("layerwise.lab.cli.compare", "layerwise.lab.cli.function_space_commands"):
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name).register(app)


_register_others()


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. A LayerwiseError is one line on standard error and exit code 2."""
    try:
        app(arguments, prog_name="layerwise", standalone_mode=True)
    except LayerwiseError as error:
        if rank := processes.rank():
            time.sleep(5)  # what the first process says too is said once: its launcher ends the others
        where = f" (process {rank})" if rank else ""
        print(f"layerwise{where}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            print(
                "layerwise: interrupted; what is finished is kept (`train`: --resume goes on)",
                file=sys.stderr,
            )
        raise
