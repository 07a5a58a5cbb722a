"""The base model's rates: recorded once on a small model, carried to large ones in a JSON file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.isolation import unwrap
from layerwise.function_space.rates import Rates
from layerwise.function_space.steps.optimizer_facts import class_name, group_of, optimized, settings
from layerwise.function_space.steps.recorder import FunctionSpaceRecorder

FORMAT = 1


@dataclass(frozen=True)
class BaseRate:
    """One base tensor at one step.

    value: its function-space rate in that step. lr: the learning rate that it had, so that `value / lr` is
    the rate per unit learning rate. stderr: over probes. spread: standard deviation over seeds (`None`: one
    seed).
    """

    value: float
    lr: float
    stderr: float | None
    spread: float | None = None

    @property
    def per_lr(self) -> float:
        """Function-space rate per unit learning rate; `nan` at a learning rate of 0."""
        return self.value / self.lr if self.lr else math.nan


@dataclass(frozen=True)
class Fingerprint:
    """What base rates were recorded with. The first part has to be the same where they are used."""

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
                    warnings.warn(
                        f"the base was measured on {self.entries} output entries, this model on {value}: "
                        "the same batch shape compares better",
                        stacklevel=4,
                    )
            elif getattr(self, key) != value:
                differences.append(f"{key} is {value!r}, the base has {getattr(self, key)!r}")
        if differences:
            raise LayerwiseError("the base was recorded differently: " + "; ".join(differences))

    def _settings_differences(
        self, names: Mapping[str, str], found: Mapping[str, Mapping[str, str]]
    ) -> list[str]:
        differences: dict[str, str] = {}
        for name, here in found.items():
            base = self.settings.get(names[name], {})
            for key in sorted(set(here) | set(base)):
                if here.get(key) != base.get(key):
                    text = (
                        f"optimizer setting {key} is {here.get(key)}, the base has {base.get(key)} (for "
                        f"{name!r})"
                    )
                    differences.setdefault(key, text)
        return list(differences.values())


@dataclass(frozen=True)
class BaseRates:
    """Base rates by scheduled step and parameter name, and what they were recorded with."""

    records: Mapping[int, Mapping[str, BaseRate]]
    fingerprint: Fingerprint

    @property
    def names(self) -> list[str]:
        """Names of the base tensors."""
        return list(next(iter(self.records.values())))

    def at(self, step: int) -> Mapping[str, BaseRate]:
        """The record of one scheduled step."""
        if step not in self.records:
            raise LayerwiseError(
                f"the base has no record of step {step}, only of {sorted(self.records)}: record it at the "
                "steps where "
                "it is to be matched, or change at= and every="
            )
        return self.records[step]

    @staticmethod
    def of(recorder: FunctionSpaceRecorder) -> BaseRates:
        """All that a recorder has measured, as one seed's base rates."""
        if not recorder.records:
            raise LayerwiseError(
                "the recorder has no records: surround at least one optimizer step with recorder.step"
            )
        records = {
            record.scheduled: {
                name: BaseRate(rate.value, record.lrs[name], None if math.isnan(rate.stderr) else rate.stderr)
                for name, rate in record.rates.items()
            }
            for record in recorder.records
        }
        return BaseRates(
            records, fingerprint(recorder.model, recorder.optimizer, recorder, recorder.records[0].rates)
        )

    @staticmethod
    def mean(several: Iterable[BaseRates]) -> BaseRates:
        """The average over seeds, with the spread; they must have been recorded alike."""
        bases = list(several)
        if not bases:
            raise LayerwiseError("no base rates to average: run at least one seed")
        first = bases[0]
        same = {name: name for name in first.names}
        for other in bases[1:]:
            if other.names != first.names or other.records.keys() != first.records.keys():
                raise LayerwiseError("base rates to average must have the same parameters and steps")
            first.fingerprint.require(same, **_comparable(other.fingerprint))
        records = {
            step: {name: _mean_rate([base.records[step][name] for base in bases]) for name in first.names}
            for step in first.records
        }
        seeds = [seed for base in bases for seed in base.fingerprint.seeds]
        return BaseRates(records, replace(first.fingerprint, seeds=seeds))

    def save(self, path: str | Path) -> None:
        """Write the base file as a whole: where it fails, an older file stays as it was.

        Raises:
            LayerwiseError: it cannot be written there.
        """
        data = asdict(self.fingerprint)
        data["settings"] = _by_settings(self.fingerprint.settings)
        records = {str(s): {n: asdict(r) for n, r in rates.items()} for s, rates in self.records.items()}
        text = json.dumps({"format": FORMAT, "fingerprint": data, "records": records}, indent=1)
        _write_whole(path, text + "\n")

    @staticmethod
    def load(path: str | Path) -> BaseRates:
        """Read a base file.

        Raises:
            LayerwiseError: not a base file, or one of another format.
        """
        unlike = f"{str(path)!r} is not a base file: `layerwise record` writes one"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            mend = "record one, or use base='uniform'"
            raise LayerwiseError(f"base file {str(path)!r} does not exist: {mend}") from None
        except OSError as error:
            mend = "give the file that `layerwise record` wrote"
            raise LayerwiseError(
                f"base file {str(path)!r} cannot be read ({error.strerror}): {mend}"
            ) from None
        except UnicodeDecodeError:
            raise LayerwiseError(f"{unlike} (this is not text)") from None
        except json.JSONDecodeError as error:
            raise LayerwiseError(f"{unlike} (this is not JSON: {error})") from None
        # Other files of ours, such as a run's run.json, are JSON with a `format` too.
        if not isinstance(data, dict) or "fingerprint" not in data:
            raise LayerwiseError(unlike)
        if data.get("format") != FORMAT:
            raise LayerwiseError(
                f"base file {str(path)!r} has format {data.get('format')!r}, not {FORMAT}: record it again"
            )
        try:
            by_name = {
                name: group["settings"]
                for group in data["fingerprint"]["settings"]
                for name in group["names"]
            }
            found = Fingerprint(**{**data["fingerprint"], "settings": by_name})
            records = {
                int(s): {n: BaseRate(**r) for n, r in rates.items()} for s, rates in data["records"].items()
            }
            if not records:
                raise ValueError("no records")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LayerwiseError(f"base file {str(path)!r} is damaged ({error}): record it again") from None
        return BaseRates(records, found)


def record_base(run: Callable[[int], FunctionSpaceRecorder], seeds: Iterable[int] = (0, 1, 2)) -> BaseRates:
    """Base rates averaged over seeds: `run(seed)` trains a fresh small model and returns its recorder.

    def run(seed):
        torch.manual_seed(seed)
        model = ...; optimizer = ...; recorder = lw.FunctionSpaceRecorder(model, optimizer, seed=seed)
        loss(model, batch).backward()
        with recorder.step(other_batch):
            optimizer.step()
        return recorder
    """
    return BaseRates.mean([replace_seed(BaseRates.of(run(seed)), seed) for seed in seeds])


def replace_seed(base: BaseRates, seed: int) -> BaseRates:
    """The same, noted as of this seed."""
    return replace(base, fingerprint=replace(base.fingerprint, seeds=[seed]))


def fingerprint(
    model: nn.Module, optimizer: Optimizer, recorder: FunctionSpaceRecorder, rates: Rates
) -> Fingerprint:
    """What these rates were recorded with."""
    model = unwrap(model)
    parameters = optimized(model, optimizer)
    shapes = json.dumps({name: list(p.shape) for name, p in parameters.items()})
    return Fingerprint(
        space=rates.space,
        classes=rates.classes,
        dtype=rates.dtype,
        method=rates.method,
        batch_norm=recorder.measurement.batch_norm,
        decay=recorder.decay,
        optimizer=class_name(optimizer),
        settings=settings_by_name(model, optimizer),
        entries=rates.entries,
        probes=rates.probes,
        seeds=[recorder.measurement.seed],
        model=type(model).__qualname__,
        parameters=sum(p.numel() for p in parameters.values()),
        shapes=hashlib.sha256(shapes.encode()).hexdigest()[:16],
        versions=_versions(),
    )


def settings_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, str]]:
    """The optimizer's settings for each parameter."""
    groups = group_of(optimizer, optimized(model, optimizer))
    return {name: settings(group) for name, group in groups.items()}


def _comparable(found: Fingerprint) -> dict[str, Any]:
    keys = ("space", "classes", "dtype", "method", "batch_norm", "decay", "optimizer", "settings")
    return {key: getattr(found, key) for key in keys}


def _mean_rate(rates: Sequence[BaseRate]) -> BaseRate:
    if len({rate.lr for rate in rates}) > 1:
        raise LayerwiseError(
            f"seeds were recorded at different learning rates: {sorted({r.lr for r in rates})}"
        )
    spread = stdev([rate.value for rate in rates]) if len(rates) > 1 else None
    errors = [rate.stderr for rate in rates if rate.stderr is not None]
    stderr = math.hypot(*errors) / len(rates) if len(errors) == len(rates) else None
    return BaseRate(fmean(rate.value for rate in rates), rates[0].lr, stderr, spread)


def _write_whole(path: str | Path, text: str) -> None:
    """Write a file beside it first: a reader sees the old text or the new one."""
    target = Path(os.path.realpath(path))  # a link goes on pointing to the file
    if target.exists() and not target.is_file():  # replacing a device such as /dev/null would remove it
        raise LayerwiseError(f"base file {str(path)!r} cannot be written (not a plain file): name a file")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise LayerwiseError(
            f"base file {str(path)!r} cannot be written ({error.strerror}): name a file in a folder that can "
            "be written to"
        ) from None


def _by_settings(by_name: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """Names listed under the settings that they share: a file for people to read."""
    groups: list[dict[str, Any]] = []
    for name, found in by_name.items():
        for group in groups:
            if group["settings"] == found:
                group["names"].append(name)
                break
        else:
            groups.append({"settings": dict(found), "names": [name]})
    return groups


def _versions() -> dict[str, str]:
    try:
        own = version("layerwise")
    except PackageNotFoundError:
        own = "unknown"
    return {"layerwise": own, "torch": torch.__version__}
