"""How the work is shared out, and what happens when the processes do not see the same."""

import functools

import pytest
from distributed_runs import (
    counted,
    different_models,
    halves_not_averaged,
    make,
    partly_missing,
    poisoned,
    tensor_parallel,
    two_dimensional_shards,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from layerwise.optim.work.placement import assign, part_shapes, rounds

COSTS = st.lists(st.integers(1, 10**9), max_size=60)


@given(COSTS, st.integers(1, 9))
def test_no_process_gets_more_than_its_share_and_one_job(costs, processes):
    owners = assign(tuple(costs), processes)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == p) for p in range(processes)]
    assert max(loads) <= sum(costs) / processes + max(costs, default=0)
    assert set(owners) <= set(range(processes))


@given(COSTS, st.integers(1, 9), st.integers(1, 10**9))
def test_rounds_hold_every_job_once_and_keep_to_the_limit(sizes, processes, limit):
    owners = assign(tuple(sizes), processes)
    planned = rounds(owners, sizes, limit)
    assert sorted(i for some in planned for i in some) == list(range(len(sizes)))
    for some in planned:
        assert some
        for p in range(processes):
            own = [sizes[i] for i in some if owners[i] == p]
            assert sum(own) <= limit or len(own) == 1


@given(st.integers(0, 40), st.integers(1, 9))
def test_parts_are_those_of_torch_chunk(size, count):
    import torch

    expected = [len(part) for part in torch.empty(size, 2).chunk(count)] if size else []
    lengths = [rows for rows, _ in part_shapes((size, 2), 0, count)]
    assert lengths == expected + [0] * (count - len(expected))


@pytest.fixture(scope="module")
def counts(cluster):
    return functools.cache(lambda world, *how: cluster.run(world, counted, *how))


@pytest.mark.parametrize("how", ["ddp", "fsdp", "hsdp"])
def test_the_work_is_split(counts, how):
    (alone,) = counts(1, "single")
    flops = [result["flops"] for result in counts(4, how)]
    assert sum(flops) == alone["flops"]  # nothing is done twice
    assert max(flops) < 0.26 * alone["flops"]


def test_bytes_sent_are_those_the_docs_give(counts):
    """docs/distributed.md, with n the bytes of all matrices, over all processes together."""
    n = 4 * 2 * (4 * 16 * 16 + 2 * 16 * 64)

    def total(collective, *how):
        return sum(result["sent"].get(collective, 0) for result in counts(4, *how))

    ddp = total("all_gather", "ddp")
    assert 3 * n <= ddp <= 1.2 * 3 * n  # every process gets what it did not do; equal lengths cost some padding
    assert total("all_to_all", "ddp") == 0
    # Differences to their owners, momenta to their owners, unit steps back: of each, 3 of 4 parts travel.
    assert total("all_to_all", "fsdp") == 3 * 3 / 4 * n
    assert total("all_gather", "fsdp") == 0
    # The same within two halves of each replica, each matrix once, and then every shard over to its replica.
    assert total("all_to_all", "hsdp") == 3 * 1 / 2 * n
    assert n <= total("all_gather", "hsdp") <= 1.2 * n
    # Between replicas it is the means that go to their owners, instead of differences; and within one replica of HSDP.
    for how in ("fsdp", "hsdp"):
        assert total("all_to_all", how, "replicas") == total("all_to_all", how)
    # What is reduced is flags and norms: a few bytes a matrix.
    assert total("all_reduce", "fsdp") <= 4 * 12 * 16


def _work_of(how):
    return type(make(how)[1].work).__name__


def test_chosen_automatically(cluster):
    assert cluster.run(1, _work_of, "single") == ["LocalWork"]
    assert cluster.run(2, _work_of, "ddp") == ["DistributedWork"] * 2


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_all_processes_come_to_one_verdict_on_a_bad_gradient(cluster, how):
    for message in cluster.run(2, poisoned, how, "raise"):
        assert "square.weight" in message
    assert cluster.run(2, poisoned, how, "skip") == [{"untouched": True, "skipped": 1}] * 2


def test_a_gradient_missing_on_one_process_stands_for_zero(cluster):
    (expected,) = cluster.run(1, partly_missing)
    for got in cluster.run(2, partly_missing):
        for name, weight in expected.items():
            assert_close(got[name], weight, rtol=0, atol=1e-12)


def test_processes_with_different_models_are_told_apart(cluster):
    for message in cluster.run(2, different_models):
        assert "same jobs" in message
        assert "LocalWork()" in message


def test_tensor_parallelism_alone_works_and_under_sharding_is_refused(cluster):
    assert cluster.run(2, tensor_parallel) == [True, True]
    for message in cluster.run(4, two_dimensional_shards):
        assert "tensor parallelism is not supported" in message


def test_halves_that_were_not_averaged_are_refused(cluster):
    for message in cluster.run(2, halves_not_averaged):
        assert "no_sync" in message
