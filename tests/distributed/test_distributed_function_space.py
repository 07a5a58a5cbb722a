"""Function-space rates are those of the global batch, at any world size: with 8 or 9 probes, in two slices of it.

All in float64. A rate is made of sums of products whose order depends on the world size: a probe's gradient adds up 64
rows, its product with the update as many terms as the tensor has entries (4620 at most). Rounding then differs by about
sqrt(5000) * 1e-16 of the sums of *absolute* values, which exceed what is left of random signs by about sqrt(5000): 1e-12.
A forgotten term, scale or part shows at 1e-3.
"""

import functools
import math

import pytest
import torch
from function_space_runs import (
    checked_alone,
    forked,
    measured,
    naive,
    naive_of_shards,
    nothing_counts,
    observed,
    refused_writer,
    tensor_parallel_rates,
    trace,
    unsynchronised,
    watched,
    weights_written,
)
from torch.testing import assert_close

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
            linear = expected[name].linear  # of whole updates alone
            assert rates[name].linear == (None if linear is None else pytest.approx(linear, rel=tolerance)), name


METHODS = ["kronecker", "full_cov", "iid", "exact", "difference"]
SETUPS = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]
QUICK = [
    ("ddp", 2, "exact"),
    ("ddp", 4, "kronecker"),
    ("fsdp", 2, "exact"),
    ("hsdp", 4, "kronecker"),
    ("fsdp", 2, "iid"),
    ("ddp", 2, "difference"),
    ("fsdp", 2, "difference"),
]


@pytest.mark.parametrize(
    ("how", "world", "method"),
    [
        pytest.param(how, world, method, marks=() if (how, world, method) in QUICK else pytest.mark.slow)
        for how, world in SETUPS
        for method in METHODS
    ],
)
def test_rates_are_those_of_one_process(cluster, single, how, world, method):
    same(single(measured, "single", method), cluster.run(world, measured, how, method))


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_processes_with_few_rows_or_none_that_count(cluster, single, memory):
    for masked in (False, True):
        several = cluster.run(4, functools.partial(measured, "ddp", "kronecker", "uneven", masked, memory=memory))
        same(single(measured, "single", "kronecker", "even", masked), several)


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("slices", [1, 4])
def test_a_tensor_without_a_gradient_on_some_processes(cluster, single, memory, slices):
    """With four slices of two rows each process has rows of two of them."""
    expected = single(forked, "kronecker", memory, slices)
    assert expected["rare.weight"].value > 0
    assert expected["never.weight"].value == 0
    same(expected, cluster.run(4, forked, "kronecker", memory, slices))


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_recorded_rates_are_those_of_one_process(cluster, single, how):
    expected = single(observed, "single", "recorder")
    several = cluster.run(2, observed, how, "recorder")
    for step, rates in enumerate(expected["rates"]):
        same(rates, [each["rates"][step] for each in several], 1e-9)


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_whole_updates_of_a_recorded_run_are_those_of_one_process(cluster, single, how):
    expected = single(observed, "single", "difference")
    several = cluster.run(2, observed, how, "difference")
    assert [whole is None for whole in expected["whole"]] == [False, True, False]
    for step in (0, 2):
        same(expected["whole"][step], [each["whole"][step] for each in several], 1e-9)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_matches_on_whole_updates_are_those_of_one_process(cluster, single, how):
    expected = single(observed, "single", "flerm on differences")
    for got in cluster.run(2, observed, how, "flerm on differences"):
        assert got["lrs"] == pytest.approx(expected["lrs"], rel=1e-8)
        for name, weight in expected["weights"].items():
            assert_close(got["weights"][name], weight, rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("how", "world"),
    [
        pytest.param(how, world, marks=() if (how, world) in [("ddp", 2), ("fsdp", 2)] else pytest.mark.slow)
        for how, world in SETUPS
    ],
)
def test_matched_rates_and_the_weights_they_lead_to(cluster, single, how, world):
    """The step that FLeRM redoes, twice, and the ones between."""
    expected = single(observed, "single", "flerm")
    several = cluster.run(world, observed, how, "flerm")
    for got in several:
        assert got["lrs"] == several[0]["lrs"]  # to the last bit
        assert got["lrs"] == pytest.approx(expected["lrs"], rel=1e-9)
        for name, weight in expected["weights"].items():
            assert_close(got["weights"][name], weight, rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_measuring_leaves_no_trace(cluster, how):
    for plain, measured_ in zip(cluster.run(2, trace, how, False), cluster.run(2, trace, how, True), strict=True):
        assert measured_.pop("measured") == 3
        assert plain.pop("measured") == 0
        assert plain.keys() == measured_.keys()
        for key, value in plain.items():
            assert torch.equal(value, measured_[key]), key


def test_naive_rates_under_data_parallelism_are_too_small_by_the_root_of_the_world(cluster):
    """Reference section 5: DDP averages the gradients of probes that are independent, and N is the process's own."""
    (alone,) = cluster.run(1, naive, "single", 80)
    for rates in cluster.run(4, naive, "ddp", 80):
        ratios = [rates[name] / alone[name] for name in alone]
        # Means over 80 probes know a rate to 8 %, their ratio to 11 %; the mean of 23 related ones no worse.
        assert sum(ratios) / len(ratios) == pytest.approx(0.5, rel=0.25)


def test_naive_sums_over_shards_are_not_those_of_the_whole(cluster):
    """Reference section 5: a process that takes its shard for the tensor. Even with gradients right, and summed up."""
    expected = cluster.run(1, naive_of_shards, "single")[0]
    several = cluster.run(4, naive_of_shards, "fsdp")
    for name in ("wide.weight", "blocks.0.up.weight"):
        assert max(each[name] for each in several) < 0.8 * expected[name]
        # Nor are they the parts of a sum: columns go through all shards. (Same probes: ours agree to 1e-11.)
        together = math.sqrt(sum(each[name] ** 2 for each in several))
        assert abs(together / expected[name] - 1) > 0.02


def test_what_is_not_supported_says_so(cluster):
    for message in cluster.run(2, tensor_parallel_rates):
        assert "not measured under tensor parallelism" in message or "not under tensor parallelism" in message
    for message in cluster.run(2, unsynchronised):
        assert "set_requires_gradient_sync(True)" in message
    for message in cluster.run(2, nothing_counts):
        assert "the mask leaves no output entry" in message


def test_a_check_of_one_process_asks_no_other(cluster, single):
    for rank, found in enumerate(cluster.run(2, checked_alone)):
        assert found == pytest.approx(single(checked_alone, rank), rel=1e-6)


@pytest.mark.parametrize("method", ["full_cov", "difference"])
def test_forwards_that_write_gathered_weights_are_measured_or_refused(cluster, single, method):
    expected, still = single(weights_written, "single", method)
    several = cluster.run(2, weights_written, "fsdp", method)
    same(expected, [rates for rates, _ in several])
    assert [still, *(moved for _, moved in several)] == [0, 0, 0]
    for message in cluster.run(2, refused_writer, method):
        assert message.startswith("the forward writes parameter '2.weight'")


@pytest.mark.parametrize(("how", "world"), [("ddp", 2), ("fsdp", 2), pytest.param("hsdp", 4, marks=pytest.mark.slow)])
def test_a_watch_sees_what_it_sees_on_one_process(cluster, single, how, world):
    expected = single(watched, "single")
    assert [len(numbers) > 20 for numbers in expected] == [True, True, True]
    assert "watch/moved" in expected[-1]
    for found in cluster.run(world, watched, how):
        for numbers, known in zip(found, expected, strict=True):
            assert numbers.keys() == known.keys()
            for key, value in known.items():
                # Updates are differences of weights: of the first, nearly cancelling gradients what is left of 1e-16.
                assert numbers[key] == pytest.approx(value, rel=1e-7, abs=1e-12), key
