"""What a number was measured on: processor, threads, versions. No names or paths of the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from layerwise.geometry.spectral.newton_schulz import PROCESSOR_UNITS

#: What decides how fast a product is, as Linux names it on x86 and on ARM.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16", "svebf16")


def describe() -> dict[str, str]:
    info = {
        "cpu": _cpu_model(),
        "bfloat16 units": ", ".join(PROCESSOR_UNITS) or "none",
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def line(between: str = " · ", colon: str = ": ") -> str:
    """`describe()` in a page."""
    return between.join(f"{key}{colon}{value}" for key, value in describe().items())


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        flags = fields.get("flags", fields.get("Features", "")).split()
        instructions = [name for name in INSTRUCTIONS if name in flags]
        family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
        return f"{fields.get('model name', 'unknown')} ({family}; {', '.join(instructions)})"
    return platform.processor() or "unknown"
