"""Checkpoints cross world sizes and ways of sharding, and the run goes on as if nothing had happened."""

import pytest
from distributed_runs import loaded_whole, moved_between_whole_and_shards, saved, saved_whole, trained
from test_distributed_parity import same


@pytest.fixture(scope="module")
def uninterrupted(cluster):
    return cluster.run(1, trained, "single", "Lanton", "previous", 4)[0]


def test_sharded_checkpoints_move_between_world_sizes(cluster, uninterrupted, tmp_path):
    (first, *others) = cluster.run(4, saved, "fsdp", str(tmp_path), range(1), False)
    assert all(other["keys"] == first["keys"] for other in others)
    assert "previous_gradient" in first["keys"]["square.weight"]  # before any step
    cluster.run(2, saved, "fsdp", str(tmp_path), range(1, 2), True)
    cluster.run(1, saved, "single", str(tmp_path), range(2, 3), True)
    same(uninterrupted, cluster.run(4, saved, "hsdp", str(tmp_path), range(3, 4), True))


def test_dcp_goes_from_ddp_into_a_plain_model_and_back(cluster, uninterrupted, tmp_path):
    cluster.run(2, saved, "ddp", str(tmp_path), range(2), False)
    cluster.run(1, saved, "single", str(tmp_path), range(2, 3), True)
    same(uninterrupted, cluster.run(2, saved, "ddp", str(tmp_path), range(3, 4), True))


@pytest.mark.parametrize(("there", "back"), [(("fsdp", 4), ("single", 1)), (("ddp", 2), ("fsdp", 2))])
def test_one_file_of_whole_tensors_loads_anywhere(cluster, uninterrupted, tmp_path, there, back):
    file = str(tmp_path / "state.pt")
    cluster.run(there[1], saved_whole, there[0], file, range(2))
    same(uninterrupted, cluster.run(back[1], loaded_whole, back[0], file, range(2, 4)))


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_whole_tensors_is_loaded_into_shards_and_one_of_shards_into_whole_tensors(cluster, uninterrupted, strict):
    same(uninterrupted, cluster.run(2, moved_between_whole_and_shards, 4, strict))
