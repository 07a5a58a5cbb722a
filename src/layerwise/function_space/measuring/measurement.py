"""Measuring: the settings that a step, a recorder or FLeRM measures with, and the way from a batch to its rates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.common.checked import PositiveInt, checked
from layerwise.common.parameter_names import first_few, unwrap
from layerwise.common.similar import nearest
from layerwise.common.tensors import is_sharded, placed_as, to_host, widened
from layerwise.errors import LayerwiseError, warn
from layerwise.function_space.measuring.exact import CHANGES, OUTPUTS, log_square, root_mean
from layerwise.function_space.measuring.moments import ESTIMATORS, TensorUpdate, combine
from layerwise.function_space.measuring.outputs import Forward, draw_probes, nothing_counts, resolve, space_name
from layerwise.function_space.measuring.process_group import Processes, ProcessesOption, processes_of
from layerwise.function_space.measuring.runners import BatchNormMode, Runner, check_numbers, in_evaluation_mode, trainable
from layerwise.function_space.measuring.slices import Slices, graphs
from layerwise.function_space.rates import Rate, Rates

# How far rounding in a forward moves its outputs, in roundings of their size: against float64 it was 0.1 to 0.6 of this
# over six kinds of network, and 1.2 at most (convolutions).
_ROUNDINGS = 4


@checked
@dataclass(frozen=True)
class Measurement:
    """How to measure: everything but the model, the update and the inputs.

    Attributes:
        forward: `forward(model, inputs)` returns the outputs, or `(outputs, mask)`; or `"log_softmax"`; default the
            model's output: a tensor, `.logits`, or the first of a tuple such as nanoGPT's `(logits, loss)`.
        method: `"full_cov"` (unbiased), `"kronecker"` or `"iid"`, which estimate by probes; `"exact"` (one forward-mode
            pass per tensor); or `"difference"`, not to first order: the outputs with the whole update less those without
            (one forward per tensor).
        probes: how many, over all batches together.
        seed: of the probes; they come from a generator of our own.
        batch_norm: `"running"` (evaluation mode) or `"batch"`: the batch's statistics; the running ones do not move.
        autocast: a dtype to run the forward under; by default none, even inside the caller's autocast.
        memory: bytes that gradients of probes taken together may use.
        processes: which processes hold parts of one global batch and measure together: `"auto"`, all of
            torch.distributed where it is initialised; a process group; or `None`: this process by itself.
        slices: how many slices of whole examples to cut a batch into; each probe differentiates one of them, so that 64
            probes on 16 slices cost four backwards of the batch. The estimators' means stay the same. `"auto"`: four
            probes a slice, of fewer than 32 eight slices, where examples do not depend on one another, and one slice where
            they do.
        linear: of `"difference"`, the method that measures the first order beside it, or `None`: nothing does.
        together: of `"exact"` and `"difference"`, a function that gives each parameter's name the name of those whose
            updates are applied at once: its block, its role.
        space: the output space's name, by which a base and a large model are told to have the same one. Default: the name
            of `forward`, and of a lambda a hash of its code.
        function: what `forward` means.

    Examples:
        `function_space_rates`, recorder and FLeRM take its fields as keywords.

        >>> model = torch.nn.Linear(3, 2)
        >>> recorder = lw.FunctionSpaceRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), probes=8, slices=4)
        >>> recorder.measurement.probes, recorder.measurement.method
        (8, 'full_cov')
    """

    forward: Forward | str | None = None
    method: str = "full_cov"
    probes: PositiveInt = 64
    seed: int = 0
    batch_norm: BatchNormMode = "running"
    autocast: torch.dtype | None = None
    memory: int = 64 << 20
    processes: ProcessesOption = "auto"
    slices: Slices = "auto"
    linear: str | None = "exact"
    together: Callable[[str], str] | None = None
    space: str = ""
    function: Forward = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        methods = (*CHANGES, *ESTIMATORS)
        if self.method not in methods:
            raise LayerwiseError(f"method is {self.method!r}: use one of {', '.join(methods)}")
        if self.linear is not None and (self.linear not in methods or self.linear == "difference"):
            raise LayerwiseError(f"linear is {self.linear!r}: use 'exact', {', '.join(ESTIMATORS)}, or None")
        first_order = self.linear if self.method == "difference" else self.method
        if self.together is not None and first_order in ESTIMATORS:
            raise LayerwiseError(f"together= needs method='exact' or 'difference', and {first_order} is asked for")
        object.__setattr__(self, "function", resolve(self.forward))
        object.__setattr__(self, "space", self.space or space_name(self.function))

    def rates(
        self,
        model: nn.Module,
        updates: Mapping[str, TensorUpdate],
        inputs: Any,
        mask: Tensor | None = None,
        seed: int | None = None,
    ) -> Rates:
        """Rates of updates, at the weights before them: an update's `old`, or the model's own.

        Args:
            model: without the wrappers that `unwrap` sees through.
            updates: by parameter name.
            inputs: of the model; a list: batches of equal weight.
            mask: which outputs count.
            seed: in place of `self.seed`.
        """
        batches = inputs if isinstance(inputs, list) else [inputs]
        if not batches:
            raise LayerwiseError("inputs is an empty list: pass at least one batch")
        if isinstance(inputs, list) and mask is not None:
            raise LayerwiseError("mask= goes with one batch: for a list let forward return (outputs, mask)")
        try:
            with running(self, model, updates, processes_of(self.processes)) as runner:
                runner.seed = self.seed if seed is None else seed
                found = (_by_probes if self.method in ESTIMATORS else _by_changes)(runner, batches, mask)
        except Exception as error:
            if isinstance(inputs, list):
                error.add_note(
                    "inputs is a list, which is several batches: of a DataLoader's [inputs, targets] give a tuple"
                )
            raise
        if self.method != "difference" or self.linear is None:
            return found
        return found.beside(replace(self, method=self.linear).rates(model, updates, inputs, mask, seed))


@contextmanager
def running(
    settings: Measurement, model: nn.Module, updates: Mapping[str, TensorUpdate], processes: Processes
) -> Iterator[Runner]:
    """What runs this model at the weights before the updates, and leaves it as it was.

    Sharded parameters are measured where they are.
    """
    with in_evaluation_mode(model, settings.batch_norm, settings.autocast):
        if not any(map(is_sharded, model.parameters())):
            yield Runner(settings, model, updates, processes)
            return
        from layerwise.function_space.measuring.fsdp import ShardedRunner, as_probes_need

        with as_probes_need(model, updates):
            yield ShardedRunner(settings, model, updates, processes)


def _by_changes(runner: Runner, batches: list[Any], mask: Tensor | None) -> Rates:
    """From the outputs' change along each update.

    The error of a difference is what rounding does to outputs of their size; the derivative's is 0.
    """
    logs: dict[str, list[Tensor]] = defaultdict(list)
    formulas: dict[str, str] = {}
    for batch in batches:
        counted = 0
        for name, (change, scale, formula) in CHANGES[runner.settings.method](runner, batch, mask):
            if not counted:
                _, [counted] = runner.count(change)
                if not counted:
                    raise nothing_counts(change.mask is not None)
            square = log_square(change, scale)
            if runner.processes.count > 1:
                square = runner.processes.sum_(widened(square).exp()).log()
            logs[name].append(square - math.log(counted))
            formulas[name] = formula
    if not logs:
        return _as_rates(runner, {})
    squares = to_host({name: torch.stack(of_batches) for name, of_batches in logs.items()}, runner.processes.same)
    sizes = {name: root_mean(of_batches.tolist()) for name, of_batches in squares.items()}
    rounding = _ROUNDINGS * torch.finfo(getattr(torch, runner.dtype)).eps * sizes.pop(OUTPUTS, 0.0)
    return _as_rates(runner, {name: (size, rounding, formulas[name]) for name, size in sizes.items()})


def _by_probes(runner: Runner, batches: list[Any], mask: Tensor | None) -> Rates:
    """By an estimator, from the gradients under random probes of the outputs."""
    settings = runner.settings
    logs: dict[str, list[Tensor]] = {name: [] for name in runner.updates}
    # Of each probe the entries that counted, and its weight: batches count alike, slices by their entries.
    drawn: list[tuple[int, float]] = []
    for index, batch in enumerate(batches):
        count = settings.probes // len(batches) + (index < settings.probes % len(batches))
        of_batch: list[tuple[int, int]] = []  # of each probe the entries that counted, and how many probes these had
        before = runner.entries
        for outputs, each in graphs(runner, batch, mask, max(1, count)):
            masked = outputs.mask is not None
            first_row, entries = runner.count(outputs)
            if sum(entries):  # padding alone has nothing to probe
                probes = draw_probes(outputs, each, runner.seed, len(drawn) + len(of_batch), first_row)
                for name, moments in runner.probe(outputs, probes).items():
                    logs[name].append(moments.logs(each * outputs.slices))
                # Of each slice the first probe, then of each the second, ...
                of_batch += [(counted, each) for counted in entries] * each
                del probes, moments
            del outputs  # before the next one is made
        total = runner.entries - before
        if not total:
            raise nothing_counts(masked)
        drawn += [(counted, counted / total / len(batches) / probes) for counted, probes in of_batch]
    return _as_rates(runner, _combined(runner, logs, drawn), len(drawn))


def _combined(
    runner: Runner, logs: Mapping[str, list[Tensor]], drawn: list[tuple[int, float]]
) -> dict[str, tuple[float, float, str]]:
    """Value, standard error and estimator of every tensor, from its log moments under each probe.

    `drawn` has of each probe how many entries counted, and its weight.
    """
    entries, weights = (torch.tensor(part, dtype=torch.float64, device="cpu") for part in zip(*drawn, strict=True))
    per_entry = entries.log()[:, None]
    by_estimator: dict[tuple[str, tuple[int, ...]], dict[str, Tensor]] = defaultdict(dict)
    for name, rows in to_host({name: torch.cat(several) for name, several in logs.items()}, runner.processes.same).items():
        estimator = ESTIMATORS[runner.settings.method](tuple(runner.updates[name].new.shape))
        by_estimator[estimator.name, estimator.exponents][name] = rows
    values = {}
    for (used, exponents), found in by_estimator.items():
        rates = combine(exponents, torch.stack(list(found.values())) - per_entry, weights)
        values.update({n: (*rate, used) for n, rate in zip(found, rates, strict=True)})
    return {name: values[name] for name in logs}


def _as_rates(runner: Runner, values: Mapping[str, tuple[float, float, str]], probes: int = 0) -> Rates:
    """Of `(value, standard error, estimator)` by name."""
    total = sum(value for value, _, _ in values.values())
    if not math.isfinite(total) and not runner.processes.rank:
        odd = first_few(name for name, (value, _, _) in values.items() if not math.isfinite(value))
        warn(f"function-space rates of {odd} are not finite: look for NaN or inf in updates, inputs and outputs")
    found = {
        name: Rate(value, stderr, value / total if total else 0.0, estimator)
        for name, (value, stderr, estimator) in values.items()
    }
    method, space = runner.settings.method, runner.settings.space
    return Rates(found, method, probes, runner.seed, runner.entries, space, runner.classes, runner.dtype)


@checked
def function_space_rates(
    model: nn.Module,
    update: Mapping[str, Tensor],
    inputs: Any,
    forward: Forward | str | None = None,
    method: str = "full_cov",
    probes: PositiveInt = 64,
    seed: int = 0,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> Rates:
    """What an update does to the model's outputs, to first order, tensor by tensor (arXiv 2502.17405).

    The rate of tensor l is the RMS over output entries of the derivative of the outputs along `dW_l`, the other tensors
    staying at their present values. Nothing is touched: weights, `.grad`, buffers, train/eval mode, global random state
    and autocast are as before.

    Args:
        model: any module; wrappers of torch.compile and data parallelism are seen through.
        update: parameter name -> dW, in the parameter's shape. Frozen parameters are left out of the result.
        inputs: a tensor, a tuple (positional arguments, as many as `forward` takes), a dict (keywords), or a list of such
            batches.
        forward: `forward(model, inputs)` returns the outputs, or `(outputs, mask)`; `"log_softmax"` by name.
        method: `"full_cov"`, `"kronecker"`, `"iid"`, `"exact"` or `"difference"`: see `Measurement`.
        probes: number of random probes, each one backward pass.
        seed: of the probes.
        mask: which outputs count, of the shape that the outputs' shape begins with (such as `[batch, positions]`).
            For dict inputs with an `attention_mask` that mask is the default.
        options: the other fields of `Measurement`.

    Returns:
        Rates by parameter name, in the outputs' unit.

    Raises:
        LayerwiseError: an unknown name, a wrong shape, or outputs that cannot be measured.

    Examples:
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> update = {"weight": torch.ones(2, 3)}
        >>> inputs = torch.eye(3)  # each output then moves by one
        >>> lw.function_space_rates(model, update, inputs, method="exact")["weight"].value
        1.0
    """
    inner = unwrap(model)
    _check_update(update, dict(inner.named_parameters()))
    parameters = {name: p for name, p in trainable(inner).items() if name in update}
    if not parameters:
        raise LayerwiseError(f"update holds frozen parameters alone ({first_few(update)}): give these requires_grad=True")
    check_numbers(parameters)
    updates = {name: TensorUpdate(placed_as(update[name], p)) for name, p in parameters.items()}
    return Measurement(forward, method, probes, seed, **options).rates(inner, updates, inputs, mask)


def _check_update(update: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    if not update:
        raise LayerwiseError("update is empty: give each parameter's name and what is added to it")
    for name, delta in update.items():
        if name not in parameters:
            near = nearest(name, parameters)
            hint = f"; did you mean {near[0]!r}?" if near else ": use names of model.named_parameters()"
            raise LayerwiseError(f"update holds {name!r}, which is no parameter of the model{hint}")
        if delta.shape != parameters[name].shape:
            raise LayerwiseError(
                f"update[{name!r}] has shape {tuple(delta.shape)}, the parameter {tuple(parameters[name].shape)}"
            )
