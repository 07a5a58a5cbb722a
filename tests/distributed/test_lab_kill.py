"""kill -9 in the lab: the launcher ends with an error in time, and the last good checkpoint carries the run on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import killed_lab
import pytest
import yaml
from lab_runs import lab_run, results, tree

from layerwise.lab.runs.checkpoint import list_checkpoints
from layerwise.lab.runs.directory import read_run

HERE = Path(__file__).parent
TIMEOUT = 60  # seconds that a process waits for another: on a busy machine a healthy one can be as late as 15
LONGEST = TIMEOUT + 240  # what is more than the timeout is starting and ending on a busy machine; torch would wait 30 min

pytestmark = pytest.mark.timeout(900)


def launched(folder: Path, moment: str, rank: int, strategy: str, processes: int = 2) -> tuple[int, str]:
    """Exit code and error output of a run under torchrun in which one process stops at the moment; it ends in time."""
    settings = {**tree(folder), "parallel": {"strategy": strategy, "timeout": TIMEOUT}}
    settings["run"]["name"] = "killed"
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = [str(HERE / "killed_lab.py"), moment, str(rank), "train", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LAYERWISE_CACHE": str(folder / "cache")}
    ended = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=LONGEST)
    return ended.returncode, ended.stderr


def goes_on(cluster, folder: Path, strategy: str) -> None:
    """Resumed, the run has every number of one that nobody killed, bit for bit."""
    changes = {"parallel.strategy": strategy, "run.name": "whole"}
    assert cluster.run(2, lab_run, str(folder), changes) == ["finished"] * 2
    changes["run.name"] = "killed"
    assert cluster.run(2, lab_run, str(folder), changes, 0, True) == ["finished"] * 2
    whole, killed = results(folder, "whole"), results(folder, "killed")
    for name, weight in whole["state"]["model"].items():
        assert weight.equal(killed["state"]["model"][name])
    assert [row.get("loss") for row in whole["metrics"]] == [row.get("loss") for row in killed["metrics"]]
    assert whole["layers"] == killed["layers"]


CASES = [
    ("write", 0, "fsdp2"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [("train", 1, "ddp"), ("train", 0, "fsdp2"), ("gather", 1, "fsdp2"), ("write", 0, "ddp")]
    ),
]


@pytest.mark.parametrize(("moment", "rank", "strategy"), CASES)
def test_one_process_killed(cluster, tmp_path, moment, rank, strategy):
    code, _ = launched(tmp_path, moment, rank, strategy)
    assert code != 0
    assert read_run(tmp_path / "runs" / "killed").status == "running"
    good = list_checkpoints(tmp_path / "runs" / "killed" / "checkpoints")
    assert [path.name for path in good] == ["step-00000003"]
    goes_on(cluster, tmp_path, strategy)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_in_time(cluster, tmp_path):
    code, errors = launched(tmp_path, "hang", 1, "ddp")
    assert code != 0
    assert "imed out" in errors
    goes_on(cluster, tmp_path, "ddp")


def _doomed(folder: str, moment: str) -> None:
    killed_lab.prepare(moment, killed_lab.STEP)
    lab_run(folder, {"run.name": "killed"})


@pytest.mark.parametrize(
    "moment", ["write", "rename", *(pytest.param(m, marks=pytest.mark.slow) for m in ("manifest", "renamed"))]
)
def test_a_single_process_killed_while_it_writes_a_checkpoint(cluster, tmp_path, moment):
    process = cluster.context.Process(target=_doomed, args=(str(tmp_path), moment))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    good = [path.name for path in list_checkpoints(tmp_path / "runs" / "killed" / "checkpoints")]
    assert good == (["step-00000006"] if moment == "renamed" else []) + ["step-00000003"]
    cluster.run(1, lab_run, str(tmp_path), {"run.name": "whole"})
    assert cluster.run(1, lab_run, str(tmp_path), {"run.name": "killed"}, 0, True) == ["finished"]
    whole, killed = (results(tmp_path, name)["state"]["model"] for name in ("whole", "killed"))
    assert all(weight.equal(killed[name]) for name, weight in whole.items())
