"""`layerwise check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from layerwise.errors import LayerwiseError
from layerwise.lab.cli.terminal import table
from layerwise.lab.cli.words import Words, numbers, seeds_of, split_words
from layerwise.lab.config.load import load_config

if TYPE_CHECKING:
    from layerwise.lab.models.family import Axis

HELP = """Check in seconds whether the layers' updates change the outputs as much at every size.

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

    from layerwise.lab.experiments.check_sizes import check_sizes, rows

    axis, sizes = _sizes(widths, depths)
    path, overrides = split_words(words)
    found = check_sizes(
        load_config(path, overrides),
        sizes,
        axis=axis,
        match=match,
        step=step,
        seeds=seeds_of(seeds),
        tolerance=tolerance,
    )
    titles = ("parameter", *(f"{size:g}" for size in found.sizes), "slope", "")
    Console().print(table(titles, rows(found)))
    uneven = [trend for trend in found.trends if not trend.flat(tolerance)]
    if uneven:
        print(f"{len(uneven)} of {len(found.trends)} rates change with the size (slope beyond {tolerance:g})")
        raise typer.Exit(1)
    print(f"all {len(found.trends)} rates are flat (slope within {tolerance:g})")


def _sizes(widths: str | None, depths: str | None) -> tuple[Axis, list[float]]:
    """What is varied, and its values. Raises LayerwiseError unless one of the two is given."""
    if widths is not None and depths is not None:
        raise LayerwiseError(
            f"--widths {widths} and --depths {depths}: check changes one of them at a time; give one"
        )
    if widths is not None:
        return "width", numbers(widths, "--widths")
    if depths is not None:
        return "depth", numbers(depths, "--depths")
    raise LayerwiseError("check needs --widths or --depths, such as --widths 64,128,256")
