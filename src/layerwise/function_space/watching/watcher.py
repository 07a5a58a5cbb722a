"""`watch`: hooks into any torch optimizer, and tells every so many steps what it does to each module."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.common.checked import NonNegativeInt, PositiveInt, checked
from layerwise.common.group_by import group_by
from layerwise.common.layer_rate import LayerRate, parameter_of
from layerwise.common.parameter_names import unwrap, unwrap_optimizer
from layerwise.common.running import under_autocast
from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.process_group import processes_of
from layerwise.function_space.rates import JsonLines
from layerwise.function_space.steps.by_module import by_module, module_updates
from layerwise.function_space.steps.named_rates import optimized
from layerwise.function_space.steps.watched_step import WatchedStep, is_outermost, when_over
from layerwise.function_space.watching.output_change import OutputChange
from layerwise.function_space.watching.watch_record import ModuleReading, UnusualRule, WatchRecord, sinks_of, unit_rates

_LOG = logging.getLogger("layerwise")


@checked
def watch(
    model: nn.Module,
    optimizer: Any,
    every: PositiveInt = 10,
    to: Any = None,
    *,
    function_space_every: NonNegativeInt | None = None,
    batch: Any = None,
    **options: Any,
) -> Watch:
    """Watch what an optimizer does to each module: nothing else in the loop changes.

    Step 1 and every `every`th are recorded. Per module: effective learning rate, RMS of weights and update and their ratio,
    the update's spectral norm (an estimate from below), the gradient's size and noise to signal, the predicted change of the
    loss; every `function_space_every`th step its share in function space too, and the sum over layers beside the parts. The
    run stays the same to the last bit, and steps in between wait for no device. A module that stands out (see
    `UnusualRule`) is named in `record.unusual`, and in a warning of the logger `layerwise`.

    Args:
        model: any module; wrappers of torch.compile and data parallelism are seen through, FSDP2's parameters are watched
            in parts.
        optimizer: any torch optimizer over some or all of its parameters, or a wrapper that keeps one as `.optimizer`.
        every: how many steps apart records are.
        to: where records go besides `Watch.records`: a path (JSON lines), a function, a TensorBoard `SummaryWriter`, a wandb
            run, or a list of these; on the first process alone.
        function_space_every: how many steps apart; a multiple of `every`, default 20 of them. 0: never.
        batch: what to measure on in function space, inputs or a function that returns them. Default: a part of what the
            model was called with in the step before, which the step's gradient has not seen.
        options: `keep` (records kept, default 1000), `rule` (an `UnusualRule`), `part` (of the batch to take, 4 for a
            quarter), and the fields of `Measurement`: `forward`, `method`, `probes` (default 8), `seed`, `processes`, ...

    Raises:
        LayerwiseError: an optimizer that holds none of the model's parameters, an interval below 1.

    Examples:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> watch = lw.watch(model, optimizer, every=10)  # to="watch.jsonl", a SummaryWriter, wandb.run, a function
        >>> for _ in range(20):  # the training loop, as it is
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> [record.step for record in watch.records]
        [1, 10, 20]
        >>> print(watch.records[-1])  # doctest: +ELLIPSIS
        step 20
        module ...
    """
    return Watch(model, optimizer, every, to, function_space_every, batch, **options)


@checked
class Watch:
    """What `watch` returns.

    Attributes:
        records: the last ones.
        steps: how many optimizer steps were seen.
        skipped: of each step at which function space was to be measured and was not, why.

    Examples:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> watch = lw.watch(model, optimizer)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> watch
        <Watch of Linear under SGD: every=10, steps=1, records=1>
        >>> watch.records[0].modules["(model)"].lr
        0.1
        >>> state = watch.state_dict()  # into the checkpoint, for `load_state_dict`
        >>> watch.detach()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        every: PositiveInt = 10,
        to: Any = None,
        function_space_every: NonNegativeInt | None = None,
        batch: Any = None,
        *,
        keep: NonNegativeInt = 1000,
        rule: UnusualRule | None = None,
        **options: Any,
    ) -> None:
        self.every = every
        self.function_space_every = 20 * every if function_space_every is None else function_space_every
        if self.function_space_every % every:
            raise LayerwiseError(
                f"function_space_every is {function_space_every}: use a multiple of every={every}, or 0 for never"
            )
        self.model = unwrap(model)
        self.optimizer = unwrap_optimizer(optimizer)
        optimized(self.model, self.optimizer)
        self.sinks = sinks_of(to)
        self.rule = UnusualRule() if rule is None else rule
        self.records: deque[WatchRecord] = deque(maxlen=keep)
        self.steps = 0
        self.outputs = OutputChange(self.model, batch, **options)
        self.processes = self.outputs.measurement.processes
        self.skipped: Mapping[int, str] = self.outputs.skipped
        self._gradients = Gradients(self.optimizer)
        self._step: WatchedStep | None = None
        self._before = self.optimizer.register_step_pre_hook(self._before_step)
        self._after = self.optimizer.register_step_post_hook(self._after_step)
        self._expect()

    def __repr__(self) -> str:
        what = f"{type(self.model).__name__} under {type(self.optimizer).__name__}"
        return f"<{type(self).__name__} of {what}: every={self.every}, steps={self.steps}, records={len(self.records)}>"

    def detach(self) -> None:
        """Leave the model and the optimizer alone from now on."""
        self._before.remove()
        self._after.remove()
        self.outputs.expect(False)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: the count of steps and what unusual is measured by. Records are the sink's business."""
        return {"steps": self.steps, "rule": self.rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; a file's records of later steps are dropped, as they are taken again."""
        self.steps = state["steps"]
        for sink in self.sinks:
            if isinstance(sink, JsonLines) and processes_of(self.processes).rank == 0:
                sink.rewind(self.steps + 1)
        self.rule.load_state_dict(state["rule"])
        self._expect()

    def _due(self, step: int) -> bool:
        return step == 1 or step % self.every == 0

    def _function_space_due(self, step: int) -> bool:
        return self.function_space_every > 0 and step % self.function_space_every == 0

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not is_outermost(optimizer):
            return
        step = self.steps + 1
        if self._due(step):
            self._step = WatchedStep(self.model, self.optimizer, self.processes)
        if self._due(step) or self._due(step + 1):
            named = optimized(self.model, self.optimizer) if self._step is None else self._step.parameters
            # The optimizer itself is the first of `args`.
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            self._gradients.before(closure is not None, named)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not is_outermost(optimizer):
            return
        self.steps += 1
        if self._due(self.steps) or self._due(self.steps + 1):
            self._gradients.after()
        if self._step is not None:
            taken, self._step = self._step, None
            taken.note()
            # Around a step of FLeRM or a recorder the watch tells later, when it expects the next step already.
            told = partial(self._tell, self.steps, taken, self.outputs.inputs, self._gradients.now, self._gradients.earlier)
            when_over(self.optimizer, told)
        self._gradients.next(self._due(self.steps + 1))
        self._expect()

    def _tell(
        self, step: int, taken: WatchedStep, inputs: Any, now: Mapping[str, Tensor], earlier: Mapping[str, Tensor]
    ) -> None:
        """Record a step that is over, and hand the record on."""
        rates, together = self.outputs.measure(taken, step, inputs) if self._function_space_due(step) else (None, None)
        with under_autocast(taken.parameters.values(), None):
            updates = module_updates(taken.updates, now, earlier, processes=taken.processes)
        units = unit_rates(self.optimizer, taken.lrs)
        lrs = _effective(taken, units)
        modules = {}
        for name, update in updates.items():
            rate = None if rates is None else rates[name]
            share = None if rates is None else rates[name] / (sum(rates.values()) or 1.0)
            modules[name] = ModuleReading(lrs[name], update, rate, share)
        changes = [u.loss_change for u in updates.values() if u.loss_change is not None]
        shapes = {
            name: tuple(taken.parameters[own].shape for own in names) for name, names in by_module(taken.parameters).items()
        }
        unusual = self.rule.judge(step, {name: update.update_rms for name, update in updates.items()}, shapes)
        record = WatchRecord(step, modules, sum(changes) if changes else None, together, units, unusual)
        self.records.append(record)
        if taken.processes.rank:
            return
        for line in unusual:
            _LOG.warning("%s", line)
        for sink in self.sinks:
            sink(record)

    def _expect(self) -> None:
        """Prepare for the steps to come."""
        self.outputs.expect(self._function_space_due(self.steps + 2), self._function_space_due(self.steps + 1))
        if self._due(self.steps + 1):
            # What sets rates within the step (FLeRM) does so in a hook of its own: ours has to come after it.
            self._before.remove()
            self._before = self.optimizer.register_step_pre_hook(self._before_step)


def _effective(taken: WatchedStep, units: Mapping[str, LayerRate]) -> dict[str, float]:
    """Each module's learning rate: of its parameters' (of the mean of their units') the mean, weighted by entries."""
    found, of_units = {}, group_by(units, parameter_of)
    for module, names in by_module(taken.parameters).items():
        sizes = [taken.parameters[name].numel() for name in names]
        each = [fmean(units[u].lr for u in of_units[n]) if n in of_units else taken.lrs[n] for n in names]
        same = all(lr == each[0] for lr in each)
        weighted = sum(size * lr for size, lr in zip(sizes, each, strict=True))
        found[module] = each[0] if same else weighted / max(1, sum(sizes))
    return found


class Gradients:
    """Holds gradients around steps: references, and a copy of those that have to last until the next step.

    Most optimizers leave `.grad` as it is. One that writes into it (to add decay, to centre it) is found out at the first
    record, which then has no gradients, and gets a copy taken before its steps from then on.

    Attributes:
        now: of the present step, by name, as it took them; unscaled where a fused optimizer unscales them itself.
        earlier: of the step before; empty where they were not kept.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.now: dict[str, Tensor] = {}
        self.earlier: dict[str, Tensor] = {}
        self._writes = False
        self._versions: dict[str, int] = {}
        self._parameters: Mapping[str, nn.Parameter] = {}

    def before(self, closure: bool, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the gradients before the step, unless it makes them itself, in a closure."""
        self.now, self._versions, self._parameters = {}, {}, parameters
        if not closure:
            self.now = self._read()
            if self._writes:
                self.now = {name: g.clone() for name, g in self.now.items()}
            self._versions = {name: g._version for name, g in self.now.items()}

    def after(self) -> None:
        """Take the closure's gradients after the step, or see whether the others still stand."""
        if not self._versions:
            self.now = self._read()
        elif any(self.now[name]._version != version for name, version in self._versions.items()):
            self._writes, self.now = True, {}

    def next(self, keep: bool) -> None:
        """The step is over; `keep`: the next one is compared with it."""
        # A loop may clear its gradients in place, or go on adding to them.
        self.earlier = {name: g.clone() for name, g in self.now.items()} if keep else {}
        self.now, self._versions, self._parameters = {}, {}, {}

    def _read(self) -> dict[str, Tensor]:
        found = {name: p.grad.detach() for name, p in self._parameters.items() if p.grad is not None}
        found = {name: g if g.layout is torch.strided else g.to_dense() for name, g in found.items()}
        scale = getattr(self.optimizer, "grad_scale", None)
        if isinstance(scale, Tensor):  # of a GradScaler, where a fused optimizer divides by it in its step
            found = {name: g / scale.to(g.device, torch.float32) for name, g in found.items()}
        return found
