"""`Rates`: what an update does to the outputs, tensor by tensor; printed, plotted, saved; and files of records."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from layerwise.common.files import plain_json, save_as, write_whole
from layerwise.common.text_table import aligned, folded
from layerwise.errors import LayerwiseError, warn

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Rate:
    """The function-space learning rate of one parameter.

    Attributes:
        value: RMS change of an output entry that this tensor's update causes, to first order, in the outputs' unit.
        stderr: its standard error over the probes (0 for `exact`, of a difference what rounding the outputs does to it);
            it knows nothing of an estimator's bias, nor of what a forward rounds on its way.
        share: its part of the sum over all tensors.
        estimator: the one used for this tensor's shape, or the formula of `exact`.
        linear: of a difference, the rate to first order.
    """

    value: float
    stderr: float
    share: float
    estimator: str
    linear: float | None = None

    @property
    def linearity(self) -> float | None:
        """The rate to first order over that of the whole update: 1 where the first order is the truth."""
        if self.linear is None:
            return None
        return self.linear / self.value if self.value else math.nan


@dataclass(frozen=True)
class Rates(Mapping[str, Rate]):
    """Rates by parameter name, and how they were measured.

    Attributes:
        rates: by parameter name, in the model's order.
        method: what was asked for; each rate says which estimator that meant for it.
        probes: how many were run.
        seed: of the probes.
        entries: how many output entries were counted (masked ones are not), summed over batches.
        space: name of the output space.
        classes: size of the outputs' last dimension.
        dtype: of the outputs.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> update = {name: 0.01 * torch.randn_like(p) for name, p in model.named_parameters()}
        >>> rates = lw.function_space_rates(model, update, torch.randn(8, 3))
        >>> print(rates.table(top=1))  # doctest: +SKIP
        >>> low, high = rates.interval("weight")
        >>> low < rates["weight"].value < high
        True
    """

    rates: Mapping[str, Rate]
    method: str
    probes: int
    seed: int
    entries: int
    space: str
    classes: int
    dtype: str

    def __getitem__(self, name: str) -> Rate:
        return self.rates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rates)

    def __len__(self) -> int:
        return len(self.rates)

    @property
    def total(self) -> float:
        """Sum of the values: by the triangle inequality, the most the outputs can move by."""
        return sum(rate.value for rate in self.rates.values())

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of a rate: symmetric in its logarithm, with Student's quantile for few probes."""
        rate = self.rates[name]
        if self.probes == 0:
            return max(0.0, rate.value - rate.stderr), rate.value + rate.stderr
        if rate.stderr == 0:
            return rate.value, rate.value
        if math.isnan(rate.stderr):
            return 0.0, math.inf
        factor = math.exp(min(student_quantile(level, self.probes - 1) * rate.stderr / rate.value, 700.0))
        return rate.value / factor, rate.value * factor

    def beside(self, first_order: Rates) -> Rates:
        """These rates of whole updates, with those to first order beside them."""
        rates = {name: replace(rate, linear=first_order.rates[name].value) for name, rate in self.rates.items()}
        return replace(self, rates=rates)

    def nonlinear(self, share: float = 0.1) -> list[str]:
        """Parameters whose first order is off by more than this part of the whole update's rate, and by more than rounding.

        There an infinitesimal step says little about this one: a router of experts that chooses others, anything rounded or
        clipped, a large step.
        """
        found = []
        for name, rate in self.rates.items():
            if rate.linear is not None and math.isfinite(rate.value):
                off = abs(rate.linear - rate.value)
                if off > share * rate.value and off > 3 * rate.stderr:
                    found.append(name)
        return found

    def __str__(self) -> str:
        """The table; of more than 40 parameters those of blocks that are alike share a line."""
        return self._text(list(self.rates), folded)

    def table(self, top: int | None = None) -> str:
        """A line a parameter, in the order of the model, or of the `top` largest rates."""
        names = list(self.rates)
        if top is not None:
            names = sorted(names, key=lambda name: -self.rates[name].value)[:top]
        return self._text(names, list)

    def _text(self, names: Sequence[str], shown: Callable[[list[tuple[str, ...]]], list[tuple[str, ...]]]) -> str:
        beside = any(self.rates[name].linear is not None for name in names)
        marked = set(self.nonlinear())
        both = ("linear", "linearity ") if beside else ()
        titles = ("parameter", "rate", *both, "stderr", "share", "estimator")
        rows: list[tuple[str, ...]] = []
        for name in names:
            rate = self.rates[name]
            mark = "*" if name in marked else " "
            both = (f"{rate.linear:.4g}", f"{rate.linearity:.3g}{mark}") if beside else ()
            numbers = (f"{rate.value:.4g}", *both, f"{rate.stderr:.2g}", f"{100 * rate.share:.1f}%")
            rows.append((name, *numbers, rate.estimator))
        how = f"{self.method}, {self.probes} probes" if self.probes else self.method
        total = ("sum", f"{self.total:.4g}", *[""] * (len(titles) - 2))
        lines = aligned([titles, *shown(rows), total], right=range(1, len(titles) - 1))
        lines.append(f"RMS change of {self.space}, {self.entries} entries, {how}")
        if marked:
            lines.append(
                "* the first order is off by more than 10 %: the step is large, chooses other experts, or is lost in "
                "what the forward rounds (8-bit activations)"
            )
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Horizontal bars with 95 % intervals on a logarithmic axis (needs matplotlib)."""
        from matplotlib import pyplot as plt

        shown = [name for name in reversed(list(self.rates)) if self.rates[name].value > 0]
        axes = ax if ax is not None else plt.subplots(figsize=(7, 1 + 0.22 * len(shown)), layout="constrained")[1]
        values = [self.rates[name].value for name in shown]
        bounds = [
            self.interval(name) if self.rates[name].stderr >= 0 else (v, v) for name, v in zip(shown, values, strict=True)
        ]
        below = [v - low for v, (low, _) in zip(values, bounds, strict=True)]
        above = [high - v for v, (_, high) in zip(values, bounds, strict=True)]
        axes.barh(shown, values, xerr=[below, above], color="#4477aa", ecolor="#888888")
        axes.set_xscale("log")
        axes.set_xlabel(f"RMS change of {self.space} in one step")
        return axes

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; a standard error that does not exist (one probe) is null."""
        data = asdict(self)
        rates = data.pop("rates")
        for rate in rates.values():
            if rate["linear"] is None:
                del rate["linear"]
        return plain_json({**data, "rates": rates})

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Rates:
        """The inverse of `to_dict`."""
        try:
            rows: Mapping[str, dict[str, Any]] = data["rates"]
            # What `to_dict` wrote as null is NaN again.
            rates = {name: Rate(**row | {k: math.nan for k, v in row.items() if v is None}) for name, row in rows.items()}
            rest = {field.name: data[field.name] for field in fields(Rates) if field.name != "rates"}
        except (KeyError, TypeError, AttributeError) as error:
            raise LayerwiseError(f"not function-space rates: {error!r} (made by Rates.to_dict or Rates.save)") from error
        return Rates(rates, **rest)

    def save(self, path: str | Path) -> None:
        """Write as JSON. Raises LayerwiseError where that cannot be."""
        save_as(path, json.dumps(self.to_dict(), indent=1) + "\n", "file of rates")

    @staticmethod
    def load(path: str | Path) -> Rates:
        """Read what `save` wrote. Raises LayerwiseError where that is not there, or is something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise LayerwiseError(f"{path}: cannot be read ({error.strerror}): give what Rates.save wrote") from None
        except ValueError as error:  # no JSON, or no text
            raise LayerwiseError(f"{path}: not function-space rates: {error} (made by Rates.save)") from None
        return Rates.from_dict(data)


def student_quantile(level: float, freedom: int) -> float:
    """Two-sided quantile of Student's t, by the Cornish-Fisher expansion (within 1 % from 4 degrees of freedom on)."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


class JsonLines:
    """A sink that appends each record (its `to_dict()`) to a file as one line of JSON.

    Lines of another run that are there already are left, and told of at the first record.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a").close()
        except OSError as error:
            raise LayerwiseError(f"{path}: cannot be written to ({error.strerror}): name a file for the records") from None
        self._others = self.path.is_file() and self.path.stat().st_size > 0

    def __call__(self, record: Any) -> None:
        if self._others:
            self._others = False
            warn(
                f"{self.path} holds records already, and those of this run come after them: name another file, or, to go on "
                "with a run, load_state_dict() what was saved with its checkpoint"
            )
        with self.path.open("a") as file:
            file.write(json.dumps(record.to_dict()) + "\n")

    def rewind(self, step: int) -> None:
        """Go on from a checkpoint: drop the records from `step` on, which the run takes again."""
        self._others = False
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_whole(self.path, "".join(line for line in lines if _step_of(line) < step))


def _step_of(line: str) -> float:
    """The step of a record: after all others of one that a kill cut off, before all of what is no record."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf
    except (KeyError, TypeError):
        return -math.inf
