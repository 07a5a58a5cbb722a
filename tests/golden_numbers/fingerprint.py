"""Tensors and numbers as short text that is equal only where every bit is, and the machine that made them."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import torch
from torch import Tensor


def digest(value: Tensor | str) -> str:
    """The first 16 digits of the sha256 of a tensor's bytes (with shape and dtype), or of text."""
    if isinstance(value, str):
        return hashlib.sha256(value.encode()).hexdigest()[:16]
    full = getattr(value, "full_tensor", None)
    tensor = (value if full is None else full()).detach().contiguous().reshape(-1)
    head = f"{tuple(value.shape)} {value.dtype} ".encode()
    return hashlib.sha256(head + bytes(tensor.view(torch.uint8).tolist())).hexdigest()[:16]


def exact(number: float) -> str:
    """A float with all its digits."""
    return float(number).hex()


def machine() -> dict[str, str]:
    """What the last bits depend on: torch's build and the kind of processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    cpu = {key.strip(): value.strip() for key, value in fields.items()}
    kind = " ".join(cpu.get(key, "?") for key in ("vendor_id", "cpu family", "model"))
    return {
        "torch": torch.__version__,
        "processor": kind if lines else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
