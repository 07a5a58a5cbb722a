"""Function-space rates are those of the global batch, at any world size.

All in float64. A rate is made of sums of products whose order depends on the world size: a probe's gradient adds up 64
rows, its product with the update as many terms as the tensor has entries (4620 at most). Rounding then differs by about
sqrt(5000) * 1e-16 of the sums of *absolute* values, which exceed what is left of random signs by about sqrt(5000): 1e-12.
A forgotten term, scale or part shows at 1e-3.
"""

import functools

import pytest
from function_space_runs import forked, measured

TOLERANCE = 1e-11


@pytest.fixture(scope="module")
def single(cluster):
    return functools.cache(
        lambda function, *args, **options: cluster.run(1, functools.partial(function, *args, **options))[0]
    )


def same(expected, several, tolerance=TOLERANCE):
    for rates in several:
        assert list(rates) == list(expected)
        assert rates.entries == expected.entries
        assert rates == several[0]  # to the last bit
        for name in expected:
            assert rates[name].value == pytest.approx(expected[name].value, rel=tolerance), name
            assert rates[name].stderr == pytest.approx(expected[name].stderr, rel=1e3 * tolerance), name


@pytest.mark.parametrize("method", ["kronecker", "full_cov", "iid", "exact"])
@pytest.mark.parametrize("world", [2, 4])
def test_data_parallel_rates_are_those_of_one_process(cluster, single, method, world):
    same(single(measured, "single", method), cluster.run(world, measured, "ddp", method))


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_processes_with_few_rows_or_none_that_count(cluster, single, memory):
    for masked in (False, True):
        several = cluster.run(
            4, functools.partial(measured, "ddp", "kronecker", "uneven", masked, memory=memory)
        )
        same(single(measured, "single", "kronecker", "even", masked), several)


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_a_tensor_without_a_gradient_on_some_processes(cluster, single, memory):
    expected = single(forked, "kronecker", memory)
    assert expected["rare.weight"].value > 0
    assert expected["never.weight"].value == 0
    same(expected, cluster.run(4, forked, "kronecker", memory))
