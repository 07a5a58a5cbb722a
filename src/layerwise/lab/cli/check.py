"""`layerwise check`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.common.parameter_names import first_few
from layerwise.errors import LayerwiseError
from layerwise.function_space import SizeCheck
from layerwise.function_space.checking.size_check import QUANTITIES
from layerwise.lab.cli.words import Words, numbers, seeds_of, split_words, whole_numbers
from layerwise.lab.config.load import load_config
from layerwise.lab.models.family import AXIS_NAMES
from layerwise.lab.runs.directory import check_output


def check(
    words: Words = None,
    sizes: Annotated[str | None, typer.Option(help="Sizes of the axis, such as 64,128,256; default: a sweep's.")] = None,
    axis: Annotated[
        str | None, typer.Option(help=f"What is varied: {', '.join(AXIS_NAMES)}, or any word; default: width, or a sweep's.")
    ] = None,
    match: Annotated[str | None, typer.Option(help="A base file, `uniform`, or `first`; default: the config's.")] = None,
    steps: Annotated[str, typer.Option(help="The optimizer steps to measure.")] = "1,10,100",
    seeds: Annotated[str, typer.Option(help="Seeds; their spread is the slopes' error.")] = "0,1",
    tolerance: Annotated[float, typer.Option(help="Largest slope that counts as flat.")] = 0.2,
    judge: Annotated[str, typer.Option(help="`rate`, or `activation_change` as in muP's check.")] = "rate",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write OUTPUT.png (slopes) and OUTPUT.csv (numbers).")
    ] = None,
) -> None:
    """Check in a few steps a size whether every layer's step does the same at every size of a model.

    Of a config (sizes of its width, or of another --axis; a sweep's has both), or of your own model:

        layerwise check package.module:make --sizes 64,128,256

    where `make(size)` returns `(model, optimizer, batch)`, and a `loss(model, batch)` if it has to. Each size trains for a
    few steps; the slope of each module's function-space rate against the size says whether one learning rate fits all. Exit
    code 0: no slope is beyond the tolerance, as far as its error can tell; 1: some are; 2: it cannot be done.
    """
    files = None if output is None else _files(output)
    found = _measured(
        words or [], None if sizes is None else numbers(sizes, "--sizes"), axis, match=match,
        steps=whole_numbers(steps, "--steps"), seeds=seeds_of(seeds), tolerance=tolerance, judge=judge,
    )  # fmt: skip
    print(found)
    if files is not None:
        _write(found, *files)
    _conclude(found)


def _files(output: Path) -> tuple[Path, Path]:
    """The picture and the numbers that `-o` asks for. Raises LayerwiseError where they could not be written."""
    if output.name in ("", ".."):
        raise LayerwiseError(f"-o: {output} is a folder: name a file, such as {output / 'check'}")
    picture, table = output.with_suffix(".png"), output.with_suffix(".csv")
    check_output(picture, "Matplotlib")
    check_output(table, "module,quantity,step,")
    return picture, table


def _measured(words: list[str], sizes: list[float] | None, axis: str | None, **options: Any) -> SizeCheck:
    """The check of a config, or of the function that `module:function` names."""
    from layerwise.lab.experiments.check_sizes import check_function, check_sizes
    from layerwise.lab.experiments.sweep.run_sweep import SweepConfig

    config = None
    if not words or ":" not in words[0] or os.path.exists(words[0]):
        config = load_config(*split_words(words), SweepConfig)
        if sizes is None and "sweep" in config.model_fields_set:
            sizes = config.sweep.sizes
    elif len(words) > 1:
        raise LayerwiseError(f"{words[1]!r} goes with a config, and {words[0]} is a function: set it there")
    if sizes is None:
        raise LayerwiseError("check needs --sizes, such as --sizes 64,128")
    if config is None:
        return check_function(words[0], sizes, axis=axis or "width", **options)
    return check_sizes(config, sizes, axis=axis or config.sweep.axis, **options)


def _conclude(found: SizeCheck) -> None:
    """The last line, and the exit code."""
    uneven = [name for name, verdict in found.verdicts.items() if verdict in ("grows", "shrinks")]
    unclear = [name for name, verdict in found.verdicts.items() if verdict == "unclear"]
    what = f"({QUANTITIES[found.judged]}, slope {{}} {found.tolerance:g})"
    if uneven:
        print(
            f"{len(uneven)} of {len(found.verdicts)} modules change with the {found.axis} {what.format('beyond')}:"
            f" {first_few(uneven, 4)}"
        )
        raise typer.Exit(1)
    judged = sum(verdict != "none" for verdict in found.verdicts.values())
    flat = f"all {judged}" if not unclear else f"{judged - len(unclear)} of {judged}"
    print(f"{flat} modules are flat in the {found.axis} {what.format('within')}")
    if unclear:
        print(f"more seeds or sizes would tell of {first_few(unclear, 4)}: the slope's interval is too wide")


def _write(found: SizeCheck, picture: Path, table: Path) -> None:
    from layerwise.lab.report.figures.size_slopes import size_slopes
    from layerwise.lab.report.style import styled

    picture.parent.mkdir(parents=True, exist_ok=True)
    with styled():
        size_slopes(found).savefig(picture)
    found.save(table)
    print(f"written to {picture} and {table}")
