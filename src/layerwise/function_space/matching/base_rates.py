"""The base model's rates: recorded once on a small model, carried to large ones in a JSON file, measured alike."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import layerwise
from layerwise.common.checked import checked
from layerwise.common.files import save_as
from layerwise.common.group_by import group_by
from layerwise.errors import LayerwiseError, warn
from layerwise.function_space.steps.named_rates import (
    UNSCHEDULED,
    class_name,
    learning_rates,
    optimized,
    settings_by_name,
)
from layerwise.function_space.steps.watched_step import FunctionSpaceRecorder, StepWatcher

#: Methods that have the same mean: what one recorded, another may match.
UNBIASED = frozenset({"exact", "full_cov"})
#: What has to be the same where rates are compared.
COMPARED = ("space", "classes", "dtype", "method", "batch_norm", "decay", "optimizer", "settings")


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
            if key == "settings":  # of another optimizer all of them differ
                differences += self._settings_differences(names, value) if found["optimizer"] == self.optimizer else []
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


def how_measured(watcher: StepWatcher) -> dict[str, Any]:
    """What a fingerprint holds of how steps are taken and measured, known before any is."""
    parameters = optimized(watcher.model, watcher.optimizer)
    return {
        "space": watcher.measurement.space,
        "method": watcher.measurement.method,
        "batch_norm": watcher.measurement.batch_norm,
        "decay": watcher.decay,
        "optimizer": class_name(watcher.optimizer),
        "settings": settings_by_name(watcher.optimizer, parameters),
    }


def fingerprint_of(recorder: FunctionSpaceRecorder) -> Fingerprint:
    """What a recorder's records were made with."""
    parameters = optimized(recorder.model, recorder.optimizer)
    shapes = json.dumps({name: list(p.shape) for name, p in parameters.items()})
    rates = recorder.records[0].rates
    return Fingerprint(
        **how_measured(recorder),
        **{key: getattr(rates, key) for key in ("classes", "dtype", "entries", "probes")},
        seeds=[recorder.measurement.seed],
        model=type(recorder.model).__qualname__,
        parameters=sum(p.numel() for p in parameters.values()),
        shapes=hashlib.sha256(shapes.encode()).hexdigest()[:16],
        versions={"layerwise": layerwise.__version__, "torch": torch.__version__},
    )


FORMAT = 1


@checked
@dataclass(frozen=True)
class BaseRate:
    """One base tensor at one step.

    Attributes:
        value: its function-space rate in that step.
        lr: the learning rate that it had, so that `value / lr` is the rate per unit learning rate.
        stderr: over probes (`None`: one probe).
        spread: standard deviation over seeds (`None`: one seed).
        nominal: the learning rate that its schedule multiplies (`None`, in older files: not known).
    """

    value: float
    lr: float
    stderr: float | None
    spread: float | None = None
    nominal: float | None = None

    @property
    def per_lr(self) -> float:
        """Function-space rate per unit learning rate; `nan` at a learning rate of 0."""
        return self.value / self.lr if self.lr else math.nan

    @property
    def unscheduled(self) -> float:
        """The learning rate that was tuned: without its schedule, where that is known."""
        return self.lr if self.nominal is None else self.nominal


@dataclass(frozen=True)
class BaseRates:
    """Base rates by scheduled step and parameter name, and what they were recorded with.

    Attributes:
        records: scheduled step -> parameter name -> rate.
        fingerprint: what they were recorded with.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> recorder = lw.FunctionSpaceRecorder(model, optimizer)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> with recorder.step(torch.randn(8, 3)):
        ...     optimizer.step()
        >>> base = lw.BaseRates.of(recorder)
        >>> base.names, base.at(0)["weight"].lr
        (['weight', 'bias'], 0.1)
        >>> base
        <BaseRates of Linear under torch.SGD: full_cov of output, parameters=2, steps=[0]>
    """

    records: Mapping[int, Mapping[str, BaseRate]]
    fingerprint: Fingerprint

    def __repr__(self) -> str:
        made = self.fingerprint
        what = f"{made.method} of {made.space}, parameters={len(made.settings)}, steps={sorted(self.records)}"
        return f"<{type(self).__name__} of {made.model} under {made.optimizer}: {what}>"

    @property
    def names(self) -> list[str]:
        """Names of the base tensors."""
        return list(next(iter(self.records.values())))

    def at(self, step: int) -> Mapping[str, BaseRate]:
        """The record of one scheduled step."""
        if step not in self.records:
            raise LayerwiseError(
                f"the base has no record of step {step}, only of {sorted(self.records)}: record it at the steps where it "
                "is to be matched, or change at= and every="
            )
        return self.records[step]

    @staticmethod
    def of(recorder: FunctionSpaceRecorder) -> BaseRates:
        """All that a recorder has measured, as one seed's base rates."""
        if not recorder.records:
            raise LayerwiseError("the recorder has no records: surround at least one optimizer step with recorder.step")
        nominal = learning_rates(recorder.optimizer, optimized(recorder.model, recorder.optimizer), UNSCHEDULED)
        records = {
            record.scheduled: {
                name: BaseRate(
                    rate.value, record.lrs[name], None if math.isnan(rate.stderr) else rate.stderr, nominal=nominal.get(name)
                )
                for name, rate in record.rates.items()
            }
            for record in recorder.records
        }
        return BaseRates(records, fingerprint_of(recorder))

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
            first.fingerprint.require(same, **{key: getattr(other.fingerprint, key) for key in COMPARED})
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
        settings = self.fingerprint.settings  # names are listed under those that they share: a file for people to read
        alike = group_by(settings, lambda name: json.dumps(settings[name], sort_keys=True))
        data["settings"] = [{"settings": dict(settings[names[0]]), "names": names} for names in alike.values()]
        records = {str(s): {n: asdict(r) for n, r in rates.items()} for s, rates in self.records.items()}
        text = json.dumps({"format": FORMAT, "fingerprint": data, "records": records}, indent=1)
        save_as(path, text + "\n", "base file")

    @staticmethod
    def load(path: str | Path) -> BaseRates:
        """Read a base file.

        Raises:
            LayerwiseError: not a base file, or one of another format.
        """
        shown = f"base file {str(path)!r}"
        unlike = f"{str(path)!r} is not a base file: `layerwise record` writes one"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise LayerwiseError(
                f"{shown} cannot be read ({error.strerror}): give what `layerwise record` wrote, or base='uniform'"
            ) from None
        except ValueError as error:  # no text, or no JSON
            raise LayerwiseError(f"{unlike} (this is not JSON: {error})") from None
        # Other files of ours, such as a run's run.json, are JSON with a `format` too.
        if not isinstance(data, dict) or "fingerprint" not in data:
            raise LayerwiseError(unlike)
        if data.get("format") != FORMAT:
            raise LayerwiseError(f"{shown} has format {data.get('format')!r}, not {FORMAT}: record it again")
        try:
            by_name = {name: group["settings"] for group in data["fingerprint"]["settings"] for name in group["names"]}
            found = Fingerprint(**{**data["fingerprint"], "settings": by_name})
            records = {int(s): {n: BaseRate(**r) for n, r in rates.items()} for s, rates in data["records"].items()}
            _check_records(records)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LayerwiseError(f"{shown} is damaged ({error}): record it again") from None
        return BaseRates(records, found)


def _check_records(records: Mapping[int, Mapping[str, BaseRate]]) -> None:
    """Raises ValueError for rates that no measurement gives, and where two steps are of other parameters."""
    if not records:
        raise ValueError("no records")
    first = next(iter(records.values()))
    for step, rates in records.items():
        if not rates or rates.keys() != first.keys():
            raise ValueError(f"the parameters of step {step} are not those of step {next(iter(records))}")
        for name, rate in rates.items():
            numbers = [number for number in asdict(rate).values() if number is not None]
            if not all(0 <= number < math.inf for number in numbers) or (rate.value and not rate.lr):
                raise ValueError(f"of {name!r} at step {step}: {rate}")


@checked
def record_base(run: Callable[[int], FunctionSpaceRecorder], seeds: Iterable[int] = (0, 1, 2)) -> BaseRates:
    """Base rates averaged over seeds.

    Args:
        run: `run(seed)` trains a fresh small model and returns its recorder.
        seeds: to call it with.

    Examples:
        >>> def run(seed):
        ...     torch.manual_seed(seed)
        ...     model = torch.nn.Linear(3, 2)
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     recorder = lw.FunctionSpaceRecorder(model, optimizer, seed=seed)
        ...     model(torch.randn(8, 3)).square().mean().backward()
        ...     with recorder.step(torch.randn(8, 3)):
        ...         optimizer.step()
        ...     return recorder
        >>> base = lw.record_base(run, seeds=(0, 1))  # and base.save("base.json")
        >>> base.fingerprint.seeds
        [0, 1]
    """
    found = []
    for seed in seeds:
        base = BaseRates.of(run(seed))
        found.append(replace(base, fingerprint=replace(base.fingerprint, seeds=[seed])))
    return BaseRates.mean(found)


def _mean_rate(rates: Sequence[BaseRate]) -> BaseRate:
    if len({rate.lr for rate in rates}) > 1:
        raise LayerwiseError(f"seeds were recorded at different learning rates: {sorted({r.lr for r in rates})}")
    spread = stdev([rate.value for rate in rates]) if len(rates) > 1 else None
    errors = [rate.stderr for rate in rates if rate.stderr is not None]
    stderr = math.hypot(*errors) / len(rates) if len(errors) == len(rates) else None
    return BaseRate(fmean(rate.value for rate in rates), rates[0].lr, stderr, spread, rates[0].nominal)
