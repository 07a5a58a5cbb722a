"""A GPU's way through the code, as far as a machine without one can follow it.

`fake_cuda/steps.py` runs optimizers and measurements on tensors of a CUDA device that have no numbers: a tensor on the other
device fails, and so does a step that waits for the device. It needs a process of its own and a compiler.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
#: What has to fail in each script.
CONTROLS = {
    "steps.py": {
        "control: two devices": "FakeTensorDeviceMismatchError",
        "control: a number": "DataDependentOutputException",
    },
    "processes.py": {
        "control: a host tensor": "ValueError",
        "control: two devices": "FakeTensorDeviceMismatchError",
        "control: a number": "DataDependentOutputException",
    },
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The device."""
    compiler = shutil.which("c++")
    if compiler is None or torch.backends.cuda.is_built():
        pytest.skip("needs a C++ compiler, and a torch that is built without CUDA")
    made = tmp_path_factory.mktemp("fake_cuda") / "device.so"
    source = ["-shared", "-fPIC", "-std=c++20", f"-I{TORCH}/include", str(HERE / "fake_cuda/device.cpp"), "-o", str(made)]
    subprocess.run([compiler, *source, f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu"], check=True)
    return made


@pytest.mark.parametrize("script", CONTROLS)
def test_nothing_mixes_devices_or_waits(script, library):
    paths = {"LD_LIBRARY_PATH": str(TORCH / "lib"), "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE / "optim")])}
    command = [sys.executable, str(HERE / "fake_cuda" / script), str(library)]
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines()]
    assert len(lines) > 13
    failed = {name: error for _, name, *error in lines if error}
    seen = {name: failed.pop(name, [""])[0] for name in CONTROLS[script]}
    assert not failed
    assert seen == CONTROLS[script]  # this way of looking sees them
