"""What the record of a run says beyond its numbers: versions, machine, parameters; and the TensorBoard copy."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from layerwise.common.layer_rate import LayerRate, parameter_of
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


#: A parameter of more units has one entry in layers.jsonl: a depthwise convolution has a unit for every channel.
MOST_UNITS = 64


def layer_entries(rates: Mapping[str, LayerRate]) -> dict[str, dict[str, Any]]:
    """Unit -> its noise, multiplier and rate, for layers.jsonl.

    A parameter of more than `MOST_UNITS` units has one entry under its own name: their mean, with the number of `units` and
    the `smallest` and `largest` of each.
    """
    units: dict[str, list[str]] = {}
    for unit in rates:
        units.setdefault(parameter_of(unit), []).append(unit)
    entries: dict[str, dict[str, Any]] = {}
    for name, members in units.items():
        if len(members) <= MOST_UNITS:
            entries |= {unit: rates[unit]._asdict() for unit in members}
        else:
            entries[name] = _summary([rates[unit] for unit in members])
    return entries


def _summary(several: Sequence[LayerRate]) -> dict[str, Any]:
    columns = dict(zip(LayerRate._fields, zip(*several, strict=True), strict=True))
    return {
        **{field: fmean(values) for field, values in columns.items()},
        "units": len(several),
        "smallest": {field: min(values) for field, values in columns.items()},
        "largest": {field: max(values) for field, values in columns.items()},
    }


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
