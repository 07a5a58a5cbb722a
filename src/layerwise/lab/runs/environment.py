"""What the record of a run says beyond its numbers: versions, machine, parameters."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.geometry import describe

_COLUMNS = ("name", "role", "geometry", "norm_group", "shape", "layout", "units")
_PACKAGES = ("layerwise", "torch", "transformers", "datasets", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Python and the packages a run's numbers depend on."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on. No host name."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def parameter_table(model: nn.Module) -> list[dict[str, Any]]:
    """The rows of `describe(model)`, of the columns that are the same on one process and on several."""
    rows = [{**vars(row), "geometry": repr(row.geometry), "layout": str(row.layout)} for row in describe(model).rows]
    return [{column: row[column] for column in _COLUMNS} for row in rows]
