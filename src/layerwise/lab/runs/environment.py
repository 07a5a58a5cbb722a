"""What the record of a run says beyond its numbers: versions, machine, parameters; and the TensorBoard copy."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.common.layer_rate import LayerRate
from layerwise.geometry import describe

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
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def parameter_table(model: nn.Module) -> list[dict[str, Any]]:
    """The rows of `describe(model)` in plain values."""
    return [
        {
            "name": row.name,
            "role": row.role,
            "geometry": str(row.geometry),
            "norm_group": row.norm_group,
            "shape": list(row.shape),
            "layout": str(row.layout),
            "units": list(row.units),
        }
        for row in describe(model).rows
    ]


class TensorBoard:
    """Metrics and layer rates as TensorBoard events in a run's `tensorboard` folder."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events after the step a run resumes from are those of the killed process: TensorBoard hides them.
        self._events = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def metrics(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key not in ("step", "tokens", "seconds") and value is not None:
                self._events.add_scalar(key, value, row["step"])

    def layers(self, row: dict[str, Any]) -> None:
        for unit, rate in row["layers"].items():
            for key in LayerRate._fields:
                self._events.add_scalar(f"{key}/{unit}", rate[key], row["step"])

    def close(self) -> None:
        self._events.close()
