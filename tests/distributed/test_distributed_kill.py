"""kill -9 of one process: the launcher ends with an error in time, and the last good checkpoint carries the run on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_runs import saved, trained
from killed_run import KILLED_AT
from test_distributed_parity import same

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["train", "save"])
def test_a_killed_process_ends_the_run_and_the_last_checkpoint_carries_on(cluster, tmp_path, moment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    ended = subprocess.run(
        [*command, str(HERE / "killed_run.py"), str(tmp_path), moment],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,  # the group's timeout is 60 s; the rest is for starting on a busy machine
    )
    assert ended.returncode != 0
    assert "Signal 9 (SIGKILL)" in ended.stderr or "SIGKILL" in ended.stderr
    good = sorted(path.name for path in tmp_path.glob("step-*"))
    assert good == [f"step-{n}" for n in range(1, KILLED_AT)]
    shutil.copytree(tmp_path / good[-1], tmp_path / "resumed")
    resumed = cluster.run(2, saved, "fsdp", str(tmp_path / "resumed"), range(KILLED_AT - 1, 5), True)
    same(cluster.run(1, trained, "single", "Lanton", "previous", 5)[0], resumed)
