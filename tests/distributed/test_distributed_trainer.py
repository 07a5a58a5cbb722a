"""transformers' Trainer on two processes records and matches the rates it does on one."""

import pytest
from test_distributed_function_space import same
from torch.testing import assert_close
from trainer_runs import trainer_run


@pytest.mark.parametrize("observer", ["recorder", "flerm"])
def test_the_callback_measures_the_global_batch(cluster, tmp_path, observer):
    """In float64, over steps with accumulated gradients; 1e-9 leaves room for what the first steps hand on."""
    (alone,) = cluster.run(1, trainer_run, str(tmp_path / "one"), observer)
    several = cluster.run(2, trainer_run, str(tmp_path / "two"), observer)
    for got in several:
        assert got["wrapped"] == "DistributedDataParallel"
        assert got["steps"] == alone["steps"] == 3
        for name, weight in alone["weights"].items():
            assert_close(got["weights"][name], weight, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    if observer == "recorder":
        assert len(alone["rates"]) == 2
        for record, rates in enumerate(alone["rates"]):
            same(rates, [each["rates"][record] for each in several], 1e-7)
    else:
        assert several[0]["lrs"] == several[1]["lrs"]
        assert several[0]["lrs"] == pytest.approx(alone["lrs"], rel=1e-7)
        checkpoint = str(tmp_path / "two" / "checkpoint-2")
        resumed = cluster.run(2, trainer_run, str(tmp_path / "two"), observer, 3, checkpoint)
        for got, before in zip(resumed, several, strict=True):
            assert got["lrs"] == before["lrs"]
            for name, weight in before["weights"].items():
                assert_close(got["weights"][name], weight, rtol=0, atol=0)
