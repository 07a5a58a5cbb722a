"""The same weights, noise and rates at world sizes 1, 2 and 4, with and without sharding.

All in float64, where the summation order of a mean over 64 samples changes a gradient by about 1e-15 of itself. Five
quintic Newton-Schulz steps amplify that by at most 3.4445^5 = 485 in the directions of the smallest singular values,
and twenty steps of a smooth training run by another factor of order 100: 1e-10 has a margin of ten, while leaving out
a scale, a shard or the mean over processes shows at 1e-3. The estimate of a nuclear norm by Lanczos steps, which is
what noise and rates rest on, is as smooth; they are held to 1e-8 of their value.
"""

import functools
import math

import pytest
from distributed_runs import RULES, trained
from torch.testing import assert_close

CASES = [(preset, "none") for preset in ("Muon", "DMuon", "Scion", "Signum")]
CASES += [("Lanton", rule) for rule in RULES if rule != "namo"] + [("DMuon", "namo")]
SETUPS = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]


@pytest.fixture(scope="module")
def single(cluster):
    return functools.cache(lambda preset, rule: cluster.run(1, trained, "single", preset, rule)[0])


@pytest.mark.parametrize(("preset", "rule"), CASES)
@pytest.mark.parametrize(("how", "world"), SETUPS)
def test_same_as_one_process(cluster, single, how, world, preset, rule):
    expected = single(preset, rule)
    for got in cluster.run(world, trained, how, preset, rule):
        assert got["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            assert_close(
                got["weights"][name], weight, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert got["rates"].keys() == expected["rates"].keys()
        for unit, rate in expected["rates"].items():
            for field in rate._fields:
                mine, theirs = getattr(got["rates"][unit], field), getattr(rate, field)
                assert (
                    math.isclose(mine, theirs, rel_tol=1e-5) or math.isnan(mine) == math.isnan(theirs) == 1
                ), (unit, field)
