"""Quantities of a run in words: counts of tokens, durations."""

from __future__ import annotations

import math


def count(x: float) -> str:
    """`1.2M`, `300k`, `0`."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{suffix}"
    return f"{x:g}"


def duration(seconds: float) -> str:
    """`48 s`, `3 min 05 s`, `2 h 10 min`; a dash for what is not known."""
    if not math.isfinite(seconds):
        return "\u2013"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
