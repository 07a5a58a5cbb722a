"""Short runs of everything give the numbers that they gave before, bit for bit: on one kind of machine alone."""

from __future__ import annotations

import json

import pytest
from fingerprint import machine
from record_numbers import FILE, PARTS, differences, part_numbers

EXPECTED = json.loads(FILE.read_text())


@pytest.mark.slow
@pytest.mark.skipif(
    EXPECTED["machine"] != machine(),
    reason=f"the last bits hold for {EXPECTED['machine']} alone, this is {machine()}",
)
@pytest.mark.parametrize("part", PARTS)
def test_short_runs_end_in_the_same_bits(part: str) -> None:
    assert differences(EXPECTED[part], part_numbers(part)) == []
