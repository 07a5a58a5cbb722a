"""`SizeCheck`: how every module's step changes with the size of the model; printed, saved, judged."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerwise.common.text_table import aligned
from layerwise.errors import LayerwiseError
from layerwise.function_space.checking.trends import QUANTITIES, Quantity, Trend, Verdict

#: From the least to the most serious.
_ORDER: tuple[Verdict, ...] = ("none", "flat", "unclear", "shrinks", "grows")


@dataclass(frozen=True)
class SizeCheck:
    """What `check` found.

    Attributes:
        axis: what the sizes are: `width`, `depth`, `rank`, ...
        sizes, steps, seeds: what was run.
        trends: of every quantity of every module at every step.
        tolerance: the largest slope that counts as flat.
        judged: the quantity by which a module is judged.

    Examples:
        >>> def sgd(model):
        ...     return torch.optim.SGD(model.parameters(), lr=0.1)
        >>> _ = torch.manual_seed(0)
        >>> batch = torch.randn(64, 4), torch.randn(64, 2)
        >>> result = lw.check(lambda rank: torch.nn.Linear(4, 2), (2, 8, 32), sgd, batch, steps=(1,), axis="rank")
        >>> result.passed, result.verdicts  # the size changes nothing here
        (True, {'(model)': 'flat'})
        >>> [round(abs(trend.slope), 6) for trend in result.of("update_rms")]
        [0.0]
    """

    axis: str
    sizes: Sequence[float]
    steps: Sequence[int]
    seeds: Sequence[int]
    trends: Sequence[Trend]
    tolerance: float
    judged: Quantity = "rate"

    @property
    def passed(self) -> bool:
        """Whether no module grows or shrinks at any step, as far as the slopes' errors can tell."""
        return not any(verdict in ("grows", "shrinks") for verdict in self.verdicts.values())

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Of each module the most serious verdict over the steps, by the quantity that is judged."""
        found: dict[str, Verdict] = {}
        for trend in self.of(self.judged):
            verdict = trend.verdict(self.tolerance)
            found[trend.module] = max(found.get(trend.module, "none"), verdict, key=_ORDER.index)
        return found

    def of(self, quantity: Quantity, step: int | None = None) -> list[Trend]:
        """The trends of one quantity, at one step or all.

        Raises:
            LayerwiseError: a quantity or a step that was not measured.
        """
        if quantity not in QUANTITIES:
            raise LayerwiseError(f"quantity is {quantity!r}: use one of {', '.join(QUANTITIES)}")
        if step is not None and step not in self.steps:
            raise LayerwiseError(f"step {step} was not measured: use one of {', '.join(map(str, self.steps))}")
        return [t for t in self.trends if t.quantity == quantity and step in (None, t.step)]

    def judging(self, quantity: Quantity) -> SizeCheck:
        """The same measurements, judged by another quantity: `activation_change` is muP's coordinate check."""
        self.of(quantity)
        return SizeCheck(self.axis, self.sizes, self.steps, self.seeds, self.trends, self.tolerance, quantity)

    def __str__(self) -> str:
        return self.table()

    def table(self, quantity: Quantity | None = None) -> str:
        """Slopes of one quantity (default: the one that is judged), a line a module, and what comes of it."""
        quantity = self.judged if quantity is None else quantity
        trends = self.of(quantity)
        modules = list(dict.fromkeys(trend.module for trend in trends))
        verdicts = self.judging(quantity).verdicts
        rows = [("module", *(f"step {step}" for step in self.steps), "")]
        for module in modules:
            row = {trend.step: trend for trend in trends if trend.module == module}
            verdict = "" if verdicts[module] == "none" else verdicts[module]
            rows.append((module, *(_slope(row.get(step)) for step in self.steps), verdict))
        lines = aligned(rows, right=range(1, len(self.steps) + 1))
        sizes = ", ".join(f"{size:g}" for size in self.sizes)
        lines.append(f"slope of log {QUANTITIES[quantity]} against log {self.axis} ({sizes}), with 95 % interval")
        return "\n".join(lines)

    def rows(self) -> Iterator[dict[str, object]]:
        """A row for each trend and size, as plain values: what `save` writes."""
        for trend in self.trends:
            for size, value in zip(trend.sizes, trend.values, strict=True):
                yield {
                    "module": trend.module,
                    "quantity": trend.quantity,
                    "step": trend.step,
                    self.axis: size,
                    "value": value,
                    "slope": trend.slope,
                    "slope_stderr": trend.stderr,
                    "verdict": trend.verdict(self.tolerance),
                }

    def save(self, path: str | Path) -> None:
        """Write a CSV file, a line for each module, quantity, step and size."""
        rows = list(self.rows())
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["module"])
            writer.writeheader()
            writer.writerows(rows)


def _slope(trend: Trend | None) -> str:
    if trend is None or trend.slope is None:
        return ""
    return f"{trend.slope:+.2f} ± {trend.margin:.2f}"
