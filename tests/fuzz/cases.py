"""How the fuzz suite is run: a short pass in every run of the tests, a long one with `-m slow`, both from fixed seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings

from layerwise.errors import LayerwiseError

Test = Callable[..., None]


def cases(short: int, long: int) -> pytest.MarkDecorator:
    """The test takes `count`: how many cases to run."""
    slow = pytest.param(long, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
    return pytest.mark.parametrize("count", [short, slow])


def one_line(error: LayerwiseError) -> None:
    """What is wrong is said, and in a message that a terminal can hold; the command line makes it one line."""
    assert str(error).strip()
    assert len(str(error)) < 20_000


def run(count: int, check: Test, **strategies: Any) -> None:
    """Runs `check` on `count` cases. What it raises is shrunk to the smallest case that does."""
    options = settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    seed(20261128)(options(given(**strategies)(check)))()
