"""The commands of README.md run one after the other, as they stand, where a fresh clone has nothing but its own files."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
#: `check` ends with 1 where rates are not flat, which is its answer.
ANSWERS = {"check": {0, 1}}


def commands() -> list[list[str]]:
    """The words of each command line, in order, without its comment; `make` sets up what the tests run in."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words and words[0] != "make"]


def test_there_are_commands_and_each_is_one_of_ours() -> None:
    starts = {words[0] for words in commands()}
    assert starts == {"layerwise", "torchrun", "accelerate"}
    assert len(commands()) >= 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_they_run_one_after_the_other(tmp_path: Path) -> None:
    for folder in ("configs", "benchmarks/transfer", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    environment = {
        **os.environ, "LAYERWISE_MOST_STEPS": "2", "LAYERWISE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    for words in commands():
        if "--multi_gpu" in words and torch.cuda.device_count() < 2:
            continue  # accelerate's launcher takes the machine's GPUs by itself, and ends where there are none
        command = [sys.executable, "-m", *words] if words[0] == "layerwise" else words
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        allowed = ANSWERS.get(words[1], {0})
        assert ended.returncode in allowed, f"{shlex.join(words)}: {ended.stderr[-2000:]}"
    assert (tmp_path / "runs" / "a" / "report.html").is_file()
