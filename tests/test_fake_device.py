"""A GPU's way through the code, as far as a machine without one can follow it.

`fake_device/steps.py` runs optimizers and measurements on tensors of a GPU (CUDA's, Apple's) that have no numbers: a tensor
on the other device fails, and so does a step that waits for the device, and float64 where there is none. It needs a process
of its own and a compiler.
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
EVERYWHERE = {
    "control: two devices": "FakeTensorDeviceMismatchError",
    "control: a number": "DataDependentOutputException",
}
#: By script and device what has to fail there.
CONTROLS = {
    ("steps.py", "cuda"): EVERYWHERE,
    ("steps.py", "mps"): {**EVERYWHERE, "control: float64": "TypeError"},
    ("processes.py", "cuda"): {**EVERYWHERE, "control: a host tensor": "ValueError"},
}


@pytest.fixture(scope="module", params=["cuda", "mps"])
def library(request, tmp_path_factory):
    """The device of that type."""
    compiler = shutil.which("c++")
    if compiler is None or torch.backends.cuda.is_built() or torch.backends.mps.is_built():
        pytest.skip("needs a C++ compiler, and a torch that is built for processors alone")
    made = tmp_path_factory.mktemp("fake_device") / "device.so"
    source = ["-shared", "-fPIC", "-std=c++20", f"-DDEVICE={request.param.upper()}", f"-I{TORCH}/include"]
    libraries = [f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([compiler, *source, str(HERE / "fake_device/device.cpp"), "-o", str(made), *libraries], check=True)
    return request.param, made


@pytest.mark.parametrize("script", ["steps.py", "processes.py"])
def test_nothing_mixes_devices_or_waits(script, library):
    device, path = library
    if (script, device) not in CONTROLS:
        pytest.skip("several processes are not for Apple's GPUs")
    paths = {"LD_LIBRARY_PATH": str(TORCH / "lib"), "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE / "optim")])}
    command = [sys.executable, str(HERE / "fake_device" / script), str(path), device]
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines()]
    assert len(lines) > 13
    failed = {name: error for _, name, *error in lines if error}
    expected = CONTROLS[script, device]
    seen = {name: failed.pop(name, [""])[0] for name in expected}
    assert not failed
    assert seen == expected  # this way of looking sees them
