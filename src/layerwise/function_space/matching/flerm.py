"""FLeRM: learning rates that make a large model's step do to its outputs what a small model's did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.common.checked import NonNegativeInt, PositiveInt, checked
from layerwise.common.parameter_names import first_few
from layerwise.errors import LayerwiseError, warn
from layerwise.function_space.matching.base_rates import BaseRates, how_measured
from layerwise.function_space.matching.decide import (
    DepthMap,
    Factor,
    Matched,
    MatchReport,
    Part,
    corrected,
    decide,
    fixed_parameters,
    infer_depth,
    noise_floor,
    rounding_noise,
    sources,
)
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.measuring.outputs import NAMED, Forward
from layerwise.function_space.rates import Rates
from layerwise.function_space.steps.named_rates import (
    UNSCHEDULED,
    Decay,
    NamedRates,
    learning_rates,
    require_linear,
)
from layerwise.function_space.steps.watched_step import StepWatcher, WatchedStep


@checked
class FLeRM(StepWatcher):
    """Function-space learning rate matching (arXiv 2502.17405), around the optimizer's step.

    At step `at`, and then every `every` steps, the step is measured at the weights before it; each parameter gets the
    learning rate at which it would have done to the outputs what the base model's did, and the step is redone at these
    rates. With rates per unit learning rate `delta_l` here and `base_l` there: `lr_l = lr * base_l / delta_l`. Afterwards
    the optimizer's groups, its schedule and its checkpoints are as without FLeRM; the matched rates are multipliers by
    parameter name that apply while it steps (`learning_rates`).

    A step that did not happen or moved nothing (GradScaler, a warm-up's rate of 0) is matched next time.

    Args:
        model: any module.
        optimizer: any torch optimizer whose step is proportional to `lr`, with any groups.
        base: a base file, `BaseRates`, or `"uniform"`: every base tensor gets an equal part, 1 / their number.
        depth: which base block each block takes its rates from, such as `{"transformer.h.*": "split"}`; in uniform mode
            the base's number of blocks in place of `"split"`. Default: the block stacks of a transformers model.
        at: the first step that matches (LoRA: 5 or later, as A has no effect at step 0).
        every: match again every so many steps, as far as the base was recorded.
        lr: `"groups"`: the groups' rates, which must be the base's up to one factor; `"base"`: the base's own rate of
            each tensor, without its schedule (the groups give that).
        fixed: name patterns of parameters that keep the groups' rates, such as `("*lora_A*",)`.
        max_change: largest factor, up or down, of one matching.
        corrections: of `method="difference"`, how often what the redone step does is measured again, and the step
            corrected: jumps and large steps do not follow their rate.
        decay: `"scaled"`: decoupled weight decay follows the matched rate; `"constant"`: `lr * weight_decay` stays.
        near_zero: a rate below this part of all rates' root sum of squares counts as rounding noise, and its parameter
            keeps its learning rate. Default: `decide.rounding_noise` of the coarsest dtype at work.
        forward: see `Measurement`; default what the base was recorded with.
        method: see `Measurement`; default what the base was recorded with, `"full_cov"` in uniform mode.
        probes: see `Measurement`.
        seed: see `Measurement`; step n's probes are seeded `seed + n`.
        options: the other fields of `Measurement`.

    Raises:
        LayerwiseError: for a base that does not fit (naming the difference), or an optimizer not proportional to lr.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> flerm = lw.FLeRM(model, optimizer, base="uniform")
        >>> for _ in range(2):
        ...     model(torch.randn(8, 3)).square().mean().backward()
        ...     with flerm.step(torch.randn(8, 3)):
        ...         optimizer.step()
        >>> flerm.learning_rates().keys() == dict(model.named_parameters()).keys()
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        base: str | Path | BaseRates = "uniform",
        depth: DepthMap | None = None,
        *,
        at: NonNegativeInt = 0,
        every: PositiveInt | None = None,
        lr: Literal["groups", "base"] = "groups",
        fixed: Sequence[str] = (),
        max_change: Factor | None = None,
        corrections: NonNegativeInt = 3,
        decay: Decay = "scaled",
        near_zero: Part | None = None,
        forward: Forward | str | None = None,
        method: str | None = None,
        probes: PositiveInt = 64,
        seed: int = 0,
        **options: Any,
    ) -> None:
        require_linear(optimizer)
        self.base = None if base == "uniform" else base if isinstance(base, BaseRates) else BaseRates.load(base)
        if self.base is not None:
            method = method or self.base.fingerprint.method
            forward = forward or NAMED.get(self.base.fingerprint.space)
        if options.get("together") is not None:
            raise LayerwiseError("FLeRM matches each parameter: leave together= out")
        measurement = Measurement(forward, method or "full_cov", probes, seed, **{"linear": None, **options})
        super().__init__(model, optimizer, measurement, decay)
        self.at, self.every, self.lr = at, every, lr
        self.max_change, self.near_zero, self.corrections = max_change, near_zero, corrections
        self.fixed = fixed_parameters(self.parameters, fixed)
        base_names = None if self.base is None else self.base.names
        inferred = {} if base_names is None else infer_depth(self.model)
        self.depth = dict(inferred if depth is None else depth)
        self.sources = sources(list(self.parameters), base_names, self.depth)
        self.nominal = learning_rates(self.optimizer, self.parameters, UNSCHEDULED)
        self._check_base()
        self.named = NamedRates(self.optimizer, self.model, decay)  # refuses an optimizer that has one, before any hook
        self._inside, self._told = False, False
        self._noticed = self.optimizer.register_step_post_hook(torch.compiler.disable(self._notice))
        self.reports: list[MatchReport] = []

    @property
    def due(self) -> bool:
        """Whether the coming step will be matched."""
        if self.pending is not None or self.steps == self.at:
            return True
        if self.every is None or self.steps < self.at or (self.base is not None and self.steps > max(self.base.records)):
            return False
        return (self.steps - self.at) % self.every == 0

    @contextmanager
    def _around(self, batch: Any, mask: Tensor | None) -> Iterator[None]:
        with super()._around(batch, mask):
            self._inside = True
            try:
                yield
            finally:
                self._inside = False
                self.named.restore()  # where the step raised

    def _notice(self, *_: Any) -> None:
        """After each of the optimizer's steps: one that should have been matched and is not surrounded is told of, once."""
        if self.due and not self._inside and not self._told:
            self._told = True
            warn(
                f"optimizer.step() was called outside of FLeRM's step(), which counts {self.steps} steps so far and is to "
                "match the coming one: rates stay the groups' until you write with flerm.step(batch): optimizer.step()"
            )

    def learning_rates(self) -> dict[str, float]:
        """Each parameter's learning rate in the next step: its group's, times its multiplier."""
        return self.named.learning_rates()

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the optimizer's state: the multipliers and the count of steps."""
        return {"multipliers": dict(self.named.multipliers), "steps": self.steps, "pending": self.pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, exactly."""
        self.named.take(state["multipliers"])
        self.steps, self.pending = state["steps"], state["pending"]

    def detach(self) -> None:
        """Leave the optimizer as it was before FLeRM."""
        self._noticed.remove()
        self.named.detach()

    def _measured(self, step: WatchedStep, rates: Rates, scheduled: int, inputs: Any, mask: Tensor | None) -> None:
        if self.base is not None:
            found = {"classes": rates.classes, "dtype": rates.dtype, "entries": rates.entries}
            self.base.fingerprint.require({}, **found)
        measured = {name: rate.value for name, rate in rates.rates.items()}
        joined = measured.keys() - self.parameters.keys()
        if joined:
            raise LayerwiseError(f"the optimizer got {first_few(joined)} after FLeRM was made: detach() it and make another")
        if not self.reports and self.base is not None:
            self._check_count(scheduled)
        targets, negligible = self._targets(step.lrs, scheduled)
        if rates.method == "difference":
            for name, rate in rates.rates.items():
                if rate.value <= 3 * rate.stderr:
                    negligible[name] = "kept: its measured difference is rounding noise"
        dtypes = {p.dtype for p in self.parameters.values()} | {getattr(torch, rates.dtype)}
        relative = rounding_noise(dtypes) if self.near_zero is None else self.near_zero
        decided = decide(measured, targets, {**negligible, **self.fixed}, relative, self.max_change)
        step.redo({name: change for name, (change, _) in decided.items()})
        for _ in range(self.corrections if rates.method == "difference" else 0):
            again = step.rates(self.measurement, inputs, mask)
            further = corrected(decided, again, targets, self.max_change)
            step.redo({name: further[name][0] / change for name, (change, _) in decided.items()})
            decided = further
        rows = {}
        for name, (change, note) in decided.items():
            self.named.multipliers[name] *= change
            lr = step.lrs[name] * self.named.multipliers[name]
            rows[name] = Matched(measured[name], targets[name], change, lr, note)
        self.reports.append(MatchReport(self.steps, rows))
        self.reports[-1].warn_of_odd("FLeRM", "reports[-1]")

    def _check_count(self, scheduled: int) -> None:
        """The optimizer's own count of steps, where it keeps one, should be ours."""
        taken = max((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), default=0)
        if taken > self.steps + 1:
            warn(
                f"the optimizer has taken {taken} steps and FLeRM has seen {self.steps + 1} of them: this is matched as the "
                f"base's step {scheduled}. A resumed run loads flerm.state_dict() beside the optimizer's; in others "
                "surround every step, or give at="
            )

    def _targets(self, now: Mapping[str, float], scheduled: int) -> tuple[dict[str, float], dict[str, str]]:
        """The function-space rate that each parameter's step should have at the groups' rates, and who has none."""
        if self.base is None:
            count = len({source.name for source in self.sources.values()})
            return {name: lr / count / self.sources[name].share for name, lr in now.items()}, {}
        record = self.base.at(scheduled)
        dtype = getattr(torch, self.base.fingerprint.dtype)
        floor = noise_floor({name: rate.value for name, rate in record.items()}, rounding_noise({dtype}))
        targets, negligible = {}, {}
        for name, here in now.items():  # what was frozen since is not there
            source = self.sources[name]
            base = record[source.name]
            if not base.value > floor:
                targets[name], negligible[name] = math.nan, "kept: its base rate is zero or rounding noise"
                continue
            scheduled_part = here / self.nominal[name] if self.nominal[name] else 0.0
            lr = here if self.lr == "groups" else base.unscheduled * scheduled_part
            targets[name] = lr * base.per_lr / source.share
        return targets, negligible

    def _check_base(self) -> None:
        """What can be compared before anything is measured."""
        if self.base is None:
            if self.lr == "base":
                raise LayerwiseError("lr='base' needs a base file: with base='uniform' use lr='groups'")
            return
        names = {name: source.name for name, source in self.sources.items()}
        self.base.fingerprint.require(names, **how_measured(self))
        unused = [name for name in self.base.names if name not in names.values()]
        if unused:
            warn(
                f"the base has rates of {len(unused)} parameters that nothing here takes ({first_few(map(repr, unused))}): "
                "names that both have may stand for other layers. Is it the base's architecture, with as many blocks or a "
                "multiple, and all of it trained?"
            )
        record = self.base.at(self.at)
        if self.every is not None:  # now, rather than when it is due in the middle of a run
            for step in range(self.at + self.every, max(max(self.base.records), self.at + self.every) + 1, self.every):
                self.base.at(step)
        if self.lr == "groups":
            self._check_group_rates({name: record[source.name].lr for name, source in self.sources.items()})

    def _check_group_rates(self, base: Mapping[str, float]) -> None:
        factors = {
            name: self.nominal[name] / lr
            for name, lr in base.items()
            if lr and self.nominal[name] and name not in self.fixed
        }
        if not factors:
            return
        low, high = min(factors, key=factors.__getitem__), max(factors, key=factors.__getitem__)
        if factors[high] > factors[low] * (1 + 1e-6):
            raise LayerwiseError(
                f"the base had other rates between parameters: {low!r} has lr {self.nominal[low]:g} (base {base[low]:g}), "
                f"{high!r} {self.nominal[high]:g} (base {base[high]:g}): give the groups the base's rates up to one factor, "
                "or pass lr='base'"
            )
