"""How the fuzz suite is run: a short pass with the other tests, a long one with `-m slow`, in parts with their own seeds."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, seed, settings

from layerwise.errors import LayerwiseError

Test = Callable[..., None]
#: A part is run, and run again, by its name: `pytest -m slow tests/fuzz -k part3`.
PART = 500
#: Seconds after which a case counts as hanging: a first one imports transformers, on a busy machine for a minute and more.
PATIENCE = 300


class Share(NamedTuple):
    """Some of a test's cases."""

    count: int
    seed: int


def cases(short: int, long: int) -> pytest.MarkDecorator:
    """The test takes `share`: how many cases to run, and from which seed."""
    slow = [
        pytest.param(
            Share(min(PART, long - first), 20261129 + number),
            marks=[pytest.mark.slow, pytest.mark.timeout(3600)],
            id=f"part{number}",
        )
        for number, first in enumerate(range(0, long, PART))
    ]
    return pytest.mark.parametrize("share", [pytest.param(Share(short, 20261128), id="short"), *slow])


def one_line(error: LayerwiseError) -> None:
    """What is wrong is said, and in a message that a terminal can hold; the command line makes it one line."""
    assert str(error).strip()
    assert len(str(error)) < 20_000


@contextmanager
def patience() -> Iterator[None]:
    """A case that takes longer than that fails."""

    def hangs(number: int, frame: object) -> None:
        raise AssertionError(f"the case was still at work after {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, hangs)
    left = signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.alarm(left)


def run(share: Share, check: Test, **strategies: Any) -> None:
    """Runs `check` on as many cases as the share has, no fewer. What it raises is shrunk to the smallest case that does."""
    ran = 0

    @functools.wraps(check)
    def counted(**arguments: Any) -> None:
        nonlocal ran
        with patience():
            check(**arguments)
        ran += 1

    options = settings(
        max_examples=share.count,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    seed(share.seed)(options(given(**strategies)(counted)))()
    assert ran >= share.count, f"only {ran} of {share.count} cases were drawn"
