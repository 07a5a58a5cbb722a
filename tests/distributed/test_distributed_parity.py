"""The same weights, noise and rates at world sizes 1, 2 and 4, with and without sharding.

All in float64, where the summation order of a mean over 64 samples changes a gradient by about 1e-16 of itself. Five
quintic Newton-Schulz steps amplify that by at most 3.4445^5 = 485 in the directions of the smallest singular values,
and a step is about 0.1 long at most, so twenty of them differ by some 1e-13: 1e-11 leaves room for the feedback of
weights on gradients, while a scale, a shard or a mean left out shows at 1e-3. Noise is kept in float32: 1e-5.
"""

import functools
import math

import pytest
from distributed_runs import RULES, sharded_after, sharded_in_training, sharded_unseen, trained
from torch.testing import assert_close

PRESETS = ("Muon", "DMuon", "Scion", "Signum")
CASES = [(preset, "none") for preset in PRESETS]
CASES += [("Lanton", rule) for rule in RULES if rule != "namo"] + [("DMuon", "namo"), ("DualMuon", "dual")]
SETUPS = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]


@pytest.fixture(scope="module")
def single(cluster):
    return functools.cache(lambda *case: cluster.run(1, trained, "single", *case)[0])


def same(expected, results):
    for got in results:
        assert got["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            assert_close(got["weights"][name], weight, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        assert got["rates"].keys() == expected["rates"].keys()
        for unit, rate in expected["rates"].items():
            for field in rate._fields:
                a, b = getattr(got["rates"][unit], field), getattr(rate, field)
                assert math.isclose(a, b, rel_tol=1e-5) or (math.isnan(a) and math.isnan(b)), (
                    unit,
                    field,
                    a,
                    b,
                )


@pytest.mark.parametrize(("preset", "rule"), CASES)
def test_every_option_over_shards_and_replicas(cluster, single, preset, rule):
    """HSDP goes through every exchange that DDP and FSDP2 do."""
    same(single(preset, rule, 4), cluster.run(4, trained, "hsdp", preset, rule, 4))


@pytest.mark.parametrize(("how", "world"), SETUPS[:-1])
def test_every_setup(cluster, single, how, world):
    same(single("Lanton", "previous", 4), cluster.run(world, trained, how, "Lanton", "previous", 4))


@pytest.mark.parametrize("run", [sharded_after, sharded_unseen, sharded_in_training])
def test_sharded_after_the_optimizer_was_made(cluster, single, run):
    same(single("Lanton", "previous", 4), cluster.run(2, run, 4))


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "rule"), CASES)
@pytest.mark.parametrize(("how", "world"), SETUPS)
def test_twenty_steps_of_every_option_in_every_setup(cluster, single, how, world, preset, rule):
    same(single(preset, rule, 20), cluster.run(world, trained, how, preset, rule, 20))
