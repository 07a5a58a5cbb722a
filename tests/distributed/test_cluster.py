"""The stand-in for machines: a failed run leaves nothing behind for the next one."""

from __future__ import annotations

import os
import time

import pytest
import torch.distributed as dist


def end_the_group_late() -> None:
    def late() -> None:
        dist.destroy_process_group = ends
        time.sleep(0.5)
        ends()

    ends, dist.destroy_process_group = dist.destroy_process_group, late


def end_on_rank_0() -> int:
    if dist.get_rank() == 0:
        os._exit(3)
    return -1


def test_a_group_that_ends_late(cluster):
    cluster.run(2, end_the_group_late)
    assert cluster.run(2, dist.get_rank) == [0, 1]


def test_a_rank_that_ends(cluster):
    with pytest.raises(RuntimeError, match="rank 0 of 2 ended with exit code 3"):
        cluster.run(2, end_on_rank_0)
    assert cluster.run(2, dist.get_rank) == [0, 1]  # not the answer of rank 1 from before
