"""`check`: train a model at several sizes for a few steps, and see which modules' steps change with the size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from layerwise.common.checked import PositiveInt, checked
from layerwise.common.parameter_names import unwrap_optimizer
from layerwise.common.running import call_given
from layerwise.common.tensors import widened
from layerwise.errors import LayerwiseError
from layerwise.function_space.checking.size_check import Quantity, Readings, SizeCheck, Value, trends
from layerwise.function_space.matching.base_rates import BaseRates, record_base
from layerwise.function_space.matching.decide import DepthMap
from layerwise.function_space.matching.flerm import FLeRM
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.measuring.outputs import Forward, model_output
from layerwise.function_space.measuring.runners import Runner, in_evaluation_mode
from layerwise.function_space.measuring.slices import each_tensor
from layerwise.function_space.rates import Rates
from layerwise.function_space.steps.by_module import ROOT, by_module, module_of, module_updates
from layerwise.function_space.steps.step_loss import Loss, given_loss, model_loss
from layerwise.function_space.steps.watched_step import FunctionSpaceRecorder, WatchedStep

#: `match="first"`: match every size to the first one.
FIRST = "first"


@checked
def check(
    make_model: Callable[[Any], nn.Module],
    sizes: Sequence[float],
    make_optimizer: Callable[[nn.Module], Optimizer],
    batch: Any,
    steps: Sequence[int] = (1, 10, 100),
    *,
    loss: Loss | None = None,
    match: str | BaseRates | None = None,
    depth: DepthMap | None = None,
    match_step: PositiveInt = 1,
    seeds: Sequence[int] = (0, 1),
    tolerance: float = 0.2,
    judge: Quantity = "rate",
    axis: str = "width",
    forward: Forward | str | None = None,
    method: str = "full_cov",
    probes: PositiveInt = 64,
    **options: Any,
) -> SizeCheck:
    """Whether one learning rate fits all sizes of a model: how each module's step changes with the size.

    Each size trains for `max(steps)` steps on the same batches, and at each of `steps` every module's function-space rate,
    the RMS of its activations and of their change since the start (muP's coordinate check), and the RMS and spectral norm of
    its update are measured. A slope of 0 of their logarithms against that of the size means that the step does the same at
    every size.

    Args:
        make_model: called with a size, returns a fresh model; torch is seeded before.
        sizes: at least two: widths, depths, LoRA ranks, initial scales, ...
        make_optimizer: called with the model, returns any torch optimizer.
        batch: one batch, a function of the step (from 0 on), or anything that yields batches. A batch is a dict of keyword
            arguments, `(inputs, targets)`, or whatever `loss` and `forward` take.
        steps: the optimizer steps to measure, counted from 1.
        loss: `loss(model, batch)`. Default: what the model returns for a dict as `.loss`, or as the one number of a tuple;
            cross-entropy or squared error of `(inputs, targets)`.
        match: FLeRM's base: `"uniform"`, `"first"` (the first size), a base file or `BaseRates`.
        depth: FLeRM's depth map.
        match_step: the step that is matched, from 1 on: LoRA's A does nothing at first, as B is 0.
        seeds: of models and probes; the spread between them gives the slopes' errors.
        tolerance: the largest slope that counts as flat.
        judge: by which quantity a module is judged: `"rate"`, or `"activation_change"` as muP's users do.
        axis: what the sizes are, in words.
        forward: runs the model on a batch's inputs; default: the model itself.
        method: how rates are measured, as in `function_space_rates`.
        probes: how many random probes.
        options: further ones of `function_space_rates`.

    Raises:
        LayerwiseError: fewer than two sizes, a step below 1, a batch without a known loss, a function that takes something
            else than it is called with.

    Examples:
        >>> def make(width):
        ...     return torch.nn.Sequential(
        ...         torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.Linear(width, 3)
        ...     )
        >>> def adam(model):
        ...     return torch.optim.Adam(model.parameters(), lr=1e-3)
        >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
        >>> result = lw.check(make, (32, 64, 128), adam, batch, steps=(1,))
        >>> print(result)  # doctest: +SKIP
        >>> result.passed
        False
    """
    _refuse(sizes, steps, seeds)
    if not tolerance >= 0:
        raise LayerwiseError(f"tolerance={tolerance}: a slope of at least 0 is needed")
    start = partial(
        SizeRun,
        _fresh(make_model),
        make_optimizer,
        batches(batch, max(steps)),
        default_loss if loss is None else partial(given_loss, loss),
        Measurement(forward, method, probes, **options),
    )
    steps = sorted(set(steps))
    with torch.random.fork_rng(), torch.enable_grad():
        if match == FIRST:
            match = record_base(partial(_base_run, start, sizes[0], match_step), seeds)
        found: list[list[Mapping[int, Readings]]] = []
        for size in sizes:
            found.append([start(size, seed).measure(steps, match, depth, match_step) for seed in seeds])
            if len(found) == 2 and found[0] == found[1]:  # to the last bit, of the same seeds
                raise LayerwiseError(f"make_model makes one model at sizes {sizes[0]} and {size}: have it use its argument")
    return SizeCheck(axis, list(sizes), steps, list(seeds), trends(sizes, steps, found), tolerance, judge)


def _refuse(sizes: Sequence[float], steps: Sequence[int], seeds: Sequence[int]) -> None:
    if not 1 < len(set(sizes)) == len(sizes) or any(size <= 0 for size in sizes):
        raise LayerwiseError(f"sizes {list(sizes)}: give at least two different ones above 0, each once")
    if not steps or min(steps) < 1:
        raise LayerwiseError(f"steps {list(steps)}: give numbers from 1 on")
    if not seeds or len(set(seeds)) < len(seeds):
        raise LayerwiseError(f"seeds {list(seeds)}: give at least one, and each once")


def _fresh(make_model: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
    """The user's function, held to a new model at every call: one that was trained before would go on from there."""
    made: WeakSet[nn.Module] = WeakSet()

    def make(size: Any) -> nn.Module:
        model = call_given("make_model", make_model, size, needed="a size, as lambda width: Model(width=width)")
        if not isinstance(model, nn.Module):
            raise LayerwiseError(f"make_model({size!r}) returned {type(model).__name__}: return a torch.nn.Module")
        if model in made:
            raise LayerwiseError(
                f"make_model({size!r}) returned a model that it had returned before: make a new one each time"
            )
        made.add(model)
        return model

    return make


def _base_run(start: Callable[[Any, int], SizeRun], size: Any, match_step: int, seed: int) -> FunctionSpaceRecorder:
    """The matched step's rates at one size, on the batch that is matched on."""
    small = start(size, seed)
    recorder = FunctionSpaceRecorder(small.model, small.optimizer, max(1, match_step - 1), **small.options)
    for step in range(match_step):
        small.backward(step)
        with recorder.step(inputs_of(small.batches[-2])):
            small.optimizer.step()
    return recorder


class SizeRun:
    """A fresh model of one size and its optimizer, seeded.

    Args:
        make_model, make_optimizer: see `check`.
        batches: one a step, then one to match and one to measure on.
        loss: of a batch.
        measurement: of function-space rates.
        size, seed: of this run.
    """

    def __init__(
        self,
        make_model: Callable[[Any], nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
        batches: Sequence[Any],
        loss: Loss,
        measurement: Measurement,
        size: Any,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.model = make_model(size)
        self.model.train()
        needed = "the model, as lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)"
        self.optimizer = unwrap_optimizer(call_given("make_optimizer", make_optimizer, self.model, needed=needed))
        device = next(self.model.parameters()).device
        self.batches = [each_tensor(batch, lambda tensor: tensor.to(device)) for batch in batches]
        self.loss = loss
        self.measurement = replace(measurement, seed=measurement.seed + seed)

    @property
    def options(self) -> dict[str, Any]:
        """How a recorder or FLeRM measures: with other probes than the result's, which would hide their own noise."""
        keys = ("forward", "method", "probes", "batch_norm", "autocast", "memory", "slices")
        found = {key: getattr(self.measurement, key) for key in keys}
        return {**found, "seed": self.measurement.seed + (1 << 20)}

    def backward(self, step: int) -> None:
        """The gradient of one step's batch, counted from 0."""
        self.optimizer.zero_grad()
        self.loss(self.model, self.batches[step]).backward()

    def measure(
        self, steps: Sequence[int], match: BaseRates | str | None, depth: DepthMap | None, match_step: int
    ) -> dict[int, Readings]:
        """Train up to the last of `steps`, counted from 1, and read what those did; FLeRM's arguments: see `check`."""
        inputs, flerm = inputs_of(self.batches[-1]), None
        if match is not None:
            own = {"method": None} if isinstance(match, BaseRates) else {}  # the base's method
            flerm = FLeRM(self.model, self.optimizer, match, depth, at=match_step - 1, **{**self.options, **own})
        activations = Activations(self.model, self.measurement.forward, inputs)
        found: dict[int, Readings] = {}
        for step in range(1, max(steps) + 1):
            self.backward(step - 1)
            around = nullcontext() if flerm is None else flerm.step(inputs_of(self.batches[-2]))
            if step not in steps:
                with around:
                    self.optimizer.step()
                continue
            with WatchedStep(self.model, self.optimizer).surrounded() as watched, around:
                self.optimizer.step()
            found[step] = self._read(watched, activations, inputs)
        return found

    def _read(self, watched: WatchedStep, activations: Activations, inputs: Any) -> Readings:
        rates = watched.rates(self.measurement, inputs)
        sizes, changes = activations.read()
        modules = module_updates(watched.updates, steps=16)
        return {
            "rate": _module_rates(rates),
            "activation": sizes,
            "activation_change": changes,
            "update_rms": {name: Value(module.update_rms) for name, module in modules.items()},
            "spectral": {name: Value(module.spectral) for name, module in modules.items() if module.spectral is not None},
        }


def _module_rates(rates: Rates) -> dict[str, Value]:
    """Of each module the sum over its tensors: the most that together they move the outputs by."""
    return {
        module: Value(sum(rates[name].value for name in names), math.hypot(*(rates[name].stderr for name in names)))
        for module, names in by_module(rates).items()
    }


class Activations:
    """The outputs of the modules that have parameters, on one batch, in evaluation mode.

    A module that is called several times in a forward counts with all of its calls, one that is never called (its weights
    are read by another) with none.

    Args:
        model: whose modules.
        forward, inputs: how the model is run.
    """

    def __init__(self, model: nn.Module, forward: Forward | str | None, inputs: Any) -> None:
        self.model = model
        self.inputs = inputs
        self.runner = Runner(Measurement(forward), model, {})
        self.start = self._outputs()

    def read(self) -> tuple[dict[str, Value], dict[str, Value]]:
        """RMS of each module's outputs now, and RMS of their difference to the start."""
        now = self._outputs()
        sizes = {name: _rms(values) for name, values in now.items()}
        changes = {
            name: _rms([a - b for a, b in zip(values, self.start[name], strict=True)])
            for name, values in now.items()
            if name in self.start
        }
        return sizes, changes

    def _outputs(self) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        names = {module_of(name) for name, p in self.model.named_parameters() if p.requires_grad}

        def keep(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None:  # it may be changed in place
                found.setdefault(name, []).append(tensor.detach().float().clone())

        with in_evaluation_mode(self.model):  # which takes the hooks off again
            for name, module in self.model.named_modules():
                if (name or ROOT) in names:
                    module.register_forward_hook(partial(keep, name or ROOT))
            self.runner.changed(self.inputs, None, {})
        return found


def _first_tensor(output: Any) -> Tensor | None:
    """The output, its `.logits`, or its first part (of an LSTM, of an attention)."""
    for candidate in (output, getattr(output, "logits", None)):
        if isinstance(candidate, Tensor):
            return candidate if candidate.is_floating_point() else None
    if isinstance(output, (tuple, list)) and output:
        return _first_tensor(output[0])
    return None


def _rms(tensors: list[Tensor]) -> Value:
    entries = sum(t.numel() for t in tensors)
    if not entries:
        return Value(0.0)
    return Value(float(torch.stack([widened(t).square().sum() for t in tensors]).sum() / entries) ** 0.5)


def batches(batch: Any, steps: int) -> list[Any]:
    """Batches for `steps` training steps, one to match and one to measure on: the same for every size.

    Args:
        batch: one batch (a tensor, a tuple or a dict), taken every time; a function of the step, from 0 on; or anything that
            yields batches (a list, a DataLoader), gone through again where it is too short.
        steps: how many training steps there are.

    Raises:
        LayerwiseError: there is no batch.
    """
    count = steps + 2
    if isinstance(batch, (Tensor, tuple, Mapping)):
        return [batch] * count
    if callable(batch):
        return [batch(step) for step in range(count)]
    if not isinstance(batch, Iterable):
        raise LayerwiseError(
            f"batch is {type(batch).__name__}: give a tensor, a tuple, a dict, a function of the step or a DataLoader"
        )
    found = list(islice(batch, count))
    if not found:
        raise LayerwiseError("batch yields nothing: give at least one batch")
    return [found[index % len(found)] for index in range(count)]


def inputs_of(batch: Any) -> Any:
    """The model's inputs in a batch: the first of `(inputs, targets)`, else the batch itself."""
    return batch[0] if _is_pair(batch) else batch


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """On `(inputs, targets)` cross-entropy for whole numbers, else the squared error; else what the model itself says.

    Raises:
        LayerwiseError: targets of another shape than the outputs, or a model that says nothing.
    """
    if not _is_pair(batch):
        return model_loss(model, batch)
    result, targets = model_output(model, batch[0]), batch[1]
    outputs = result[0] if isinstance(result, tuple) else result
    whole = not targets.is_floating_point()
    if targets.numel() != (outputs[..., 0] if whole else outputs).numel():
        raise LayerwiseError(
            f"the outputs have shape {tuple(outputs.shape)}, the targets {tuple(targets.shape)}: give "
            "loss=lambda model, batch: ..., or as batch a dict of keywords for which the model returns a loss"
        )
    if whole:
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    return functional.mse_loss(outputs, targets.reshape(outputs.shape))


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
