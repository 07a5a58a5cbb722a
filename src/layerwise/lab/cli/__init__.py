"""The command line, a file for each command."""

from layerwise.lab.cli.app import main

__all__ = ["main"]
