"""What the scripts of this folder share: where results go, a parser with the script's own text, a page of lines."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from layerwise.geometry.spectral import newton_schulz

RESULTS = Path(__file__).parent / "results"


def documented_parser(text: str | None) -> argparse.ArgumentParser:
    """Its help shows the script's docstring as it stands."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def iterate_in_float32() -> None:
    """Newton-Schulz, from here on, whatever this processor multiplies fastest: losses differ by float32's rounding alone."""
    newton_schulz.PROCESSOR_UNITS = ()


def write_page(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
