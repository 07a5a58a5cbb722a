"""The symmetric product in Triton, on the CPU by Triton's interpreter where triton is installed; its refusals anywhere.

The interpreter is chosen by an environment variable before triton is imported, so that part runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from layerwise.errors import LayerwiseError
from layerwise.geometry import polar

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs")
@pytest.mark.parametrize("path", ["triton", "triton_gram"])
def test_without_triton_or_a_gpu_the_path_is_refused_in_one_line(path: str) -> None:
    with pytest.raises(LayerwiseError, match="CUDA device" if HAS_TRITON else "not installed") as caught:
        polar(torch.ones(4, 4), path=path)
    assert "path='auto'" in str(caught.value)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (a CPU build of torch does not bring it)")
def test_the_kernel_computes_the_product_and_the_paths_the_iteration() -> None:
    script = Path(__file__).with_name("interpret_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout)
    assert len(errors) == 32
    for name, error in errors.items():
        # float32 sums of up to 200 products; results are rounded to 2^-9 or 2^-12, and differences of them twice; five steps
        # bring up the rounding (6e-8) of the smallest singular values 485 times
        steps = name.startswith("triton")
        tolerance = 3e-5 if steps else 1e-2 if "bfloat16" in name else 2e-3 if "float16" in name else 2e-6
        assert error < tolerance, (name, error)
