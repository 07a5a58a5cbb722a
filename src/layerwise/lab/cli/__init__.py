"""The command line, a file for each command."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. What is wrong with the input, or with the disk, is one line on standard error, exit code 2.

    Raises:
        SystemExit: always, with the exit code; 130 after Ctrl-C.
    """
    try:
        try:
            from layerwise.lab.cli.app import run  # here: Ctrl-C is quiet while it is imported, too
        except ModuleNotFoundError as error:
            if (error.name or "layerwise").partition(".")[0] == "layerwise":
                raise
            print(f"layerwise: the command line needs {error.name}: pip install 'layerwise[lab]'", file=sys.stderr)
            sys.exit(2)
        run(arguments)
    except KeyboardInterrupt:
        print("layerwise: interrupted", file=sys.stderr)
        sys.exit(130)


__all__ = ["main"]
