"""What base rates were recorded with, and whether a large model is measured alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import layerwise
from layerwise.common.checked import checked
from layerwise.errors import LayerwiseError, warn
from layerwise.function_space.steps.named_rates import class_name, optimized, settings_by_name
from layerwise.function_space.steps.watched_step import FunctionSpaceRecorder

#: Methods that have the same mean: what one recorded, another may match.
UNBIASED = frozenset({"exact", "full_cov"})


@checked
@dataclass(frozen=True)
class Fingerprint:
    """What base rates were recorded with.

    Attributes:
        space: name of the output space. It has to be the same where the rates are used, as all down to `settings`.
        classes: size of the outputs' last dimension.
        dtype: of the outputs.
        method: see `Measurement`; `exact` and `full_cov` have the same mean and count as equal.
        batch_norm: see `Measurement`.
        decay: see `FLeRM`.
        optimizer: its class.
        settings: its options other than rates, by parameter name.
        entries: how many output entries were counted. A different number is a warning.
        probes: how many were run.
        seeds: of the probes of each run.
        model: its class.
        parameters: how many numbers it has.
        shapes: a hash of its parameters' names and shapes.
        versions: of layerwise and torch.
    """

    space: str
    classes: int
    dtype: str
    method: str
    batch_norm: str
    decay: str
    optimizer: str
    settings: Mapping[str, Mapping[str, str]]
    entries: int
    probes: int
    seeds: Sequence[int]
    model: str
    parameters: int
    shapes: str
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise LayerwiseError(f"dtype is {self.dtype!r}, which torch does not have")

    def require(self, names: Mapping[str, str], **found: Any) -> None:
        """Compare with what a large model is measured with; `names` maps its parameters to base ones.

        Raises:
            LayerwiseError: naming every difference that would make the rates incomparable.
        """
        differences = []
        for key, value in found.items():
            if key == "settings":
                differences += self._settings_differences(names, value)
            elif key == "entries":
                if value != self.entries:
                    warn(
                        f"the base was measured on {self.entries} output entries, this model on {value}: the same batch "
                        "shape compares better"
                    )
            elif key == "method" and {value, self.method} <= UNBIASED:
                continue
            elif getattr(self, key) != value:
                differences.append(f"{key} is {value!r}, the base has {getattr(self, key)!r}")
        if differences:
            raise LayerwiseError("the base was recorded differently: " + "; ".join(differences))

    def _settings_differences(self, names: Mapping[str, str], found: Mapping[str, Mapping[str, str]]) -> list[str]:
        differences: dict[str, str] = {}
        for name, here in found.items():
            base = self.settings.get(names[name], {})
            for key in sorted(set(here) | set(base)):
                if here.get(key) != base.get(key):
                    text = f"optimizer setting {key} is {here.get(key)}, the base has {base.get(key)} (for {name!r})"
                    differences.setdefault(key, text)
        return list(differences.values())


def fingerprint_of(recorder: FunctionSpaceRecorder) -> Fingerprint:
    """What a recorder's records were made with."""
    parameters = optimized(recorder.model, recorder.optimizer)
    shapes = json.dumps({name: list(p.shape) for name, p in parameters.items()})
    rates = recorder.records[0].rates
    return Fingerprint(
        space=rates.space,
        classes=rates.classes,
        dtype=rates.dtype,
        method=rates.method,
        batch_norm=recorder.measurement.batch_norm,
        decay=recorder.decay,
        optimizer=class_name(recorder.optimizer),
        settings=settings_by_name(recorder.optimizer, parameters),
        entries=rates.entries,
        probes=rates.probes,
        seeds=[recorder.measurement.seed],
        model=type(recorder.model).__qualname__,
        parameters=sum(p.numel() for p in parameters.values()),
        shapes=hashlib.sha256(shapes.encode()).hexdigest()[:16],
        versions={"layerwise": layerwise.__version__, "torch": torch.__version__},
    )


def comparable(found: Fingerprint) -> dict[str, Any]:
    """The part that has to be the same."""
    keys = ("space", "classes", "dtype", "method", "batch_norm", "decay", "optimizer", "settings")
    return {key: getattr(found, key) for key in keys}
