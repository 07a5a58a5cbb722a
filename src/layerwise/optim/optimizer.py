"""One update rule for every geometry-aware optimizer; the presets are values for its options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from copy import copy
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.common.checked import checked
from layerwise.common.layer_rate import LayerRate, parameter_of
from layerwise.common.parameter_names import first_few, unwrap_optimizer
from layerwise.common.running import under_autocast
from layerwise.common.text_table import text_table
from layerwise.errors import LayerwiseError, warn
from layerwise.optim.groups.complete import (
    Recipe,
    as_groups,
    check_parameters,
    check_rules,
    complete,
    for_torch,
    with_layouts,
)
from layerwise.optim.groups.options import DEFAULTS, STEP_COUNTS, check_options
from layerwise.optim.groups.overview import WrittenRates, cells, described, rates_of_units
from layerwise.optim.guard import NonFiniteGuard
from layerwise.optim.rounding import Vanishing
from layerwise.optim.rules.second_gradients import SecondGradients
from layerwise.optim.state import state_dict as saving
from layerwise.optim.state.following import Following, check_model
from layerwise.optim.state.state_dict import LoadedState
from layerwise.optim.updates import Lmo
from layerwise.optim.work.job import Lineup
from layerwise.optim.work.local import MatrixWork, default_work


@checked
class LayerwiseOptimizer(Optimizer):
    """Steps of unit size in each layer's own norm, with a rate for each layer.

    For a parameter with gradient ``G`` in a group with ``update="lmo"``::

        M <- momentum * M + (1 - momentum) * G                      momentum
        u  = momentum * M + (1 - momentum) * G  if nesterov else M
        O  = factor * lmo(u)                                        direction; factor from `scaling`, times `radius`
        W <- W - lr * weight_decay * W                              decoupled decay, at the group's rate
        W <- W - lr * multiplier * O                                the step, at the unit's rate (`noise`)

    A group with ``update="adamw"`` takes torch's AdamW step. A parameter whose ``.grad`` is None is left alone. ``.grad``
    is never changed. Gradients may have any scale: only the noise rule with ``alpha > 0`` depends on it.

    Args:
        params: the groups of :func:`layerwise.param_groups`, or parameters (then treated by shape, with a warning).
        recipe: group options by role; the presets' definition.
        nonfinite: ``"raise"`` (default) or ``"skip"`` for a step with a NaN or inf gradient; see ``optim.guard``.
        rounding: ``"stochastic"`` rounds bfloat16 weights up or down at random, without bias; see ``optim.rounding``.
        work: where the work on whole matrices happens, as the attribute ``work``, which can be set later too. None: over
            all processes of torch.distributed where it is initialised at the first step, else on this one.
        defaults: group options (``layerwise.optim.groups.options.DEFAULTS``) for what neither a group nor the recipe gives.

    Raises:
        LayerwiseError: for an unknown option, a value outside its range, a complex or integer parameter.

    Examples:
        >>> model = nn.Linear(4, 8)
        >>> optimizer = lw.LayerwiseOptimizer(lw.param_groups(model), {"default": {"scaling": "unit"}}, lr=0.1, momentum=0.9)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.layer_rates())
        ['bias', 'weight']
    """

    def __init__(
        self,
        params: Iterable[Any],
        recipe: Recipe | None = None,
        *,
        nonfinite: str = "raise",
        rounding: str = "nearest",
        work: MatrixWork | None = None,
        **defaults: Any,
    ) -> None:
        defaults |= {} if rounding == "nearest" else {"rounding": rounding}
        check_options(defaults)
        self.recipe: Recipe = recipe or {}
        self.guard = NonFiniteGuard(nonfinite)
        self._second = SecondGradients()
        self._work = work
        self._following = Following()
        self._vanishing = Vanishing()
        self._lineup = Lineup()
        super().__init__(as_groups(params), DEFAULTS | defaults)
        check_rules(self.param_groups)
        self._rates: WrittenRates | None = WrittenRates(self.param_groups)

    # ------------------------------------------------------------------------------------------ groups and state

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of :func:`layerwise.param_groups`, or any group of parameters.

        Plain parameters of a model whose groups are here get the roles that they have in it, others are split by shape.
        """
        self._follow_parameters()
        known = [param for group in self.param_groups for param in group["params"]]
        names = {name for group in self.param_groups for name in group["param_names"]}
        origin, ready = param_group.get("origin"), []
        for part in self._following.by_role(param_group):
            for given in with_layouts(part, len(known)):  # all are checked before any is added
                group = complete(given, self.recipe, self.defaults)
                check_parameters(group["params"], known, names)
                ready.append((group, [group["update"].allocate(group, name, param) for name, param in group["params"]]))
                origin = origin or part.get("origin")
        for group, states in ready:
            params = [param for _, param in group["params"]]
            super().add_param_group(for_torch(group, self.param_groups))
            self.state.update(zip(params, states, strict=True))
        self._following.note(self.param_groups, origin)

    def add_trainable(self, model: nn.Module, batch: Any = None) -> list[str]:
        """Take over what has changed in a model: parameters that are trained since, that were replaced, or that are gone.

        New ones get the roles that the model gives them. They join the group that they belong to, with its rate as it
        is, and get one of their own where there is none; overrides and splits are those that the groups were made with.
        Replaced ones keep the state that fits them. Schedules know the groups that were there when they were made: make them
        again where a group was added, ``LambdaLR(optimizer, f, last_epoch=schedule.last_epoch - 1)``.

        Args:
            model: the model, wrapped or not.
            batch: as for :func:`layerwise.param_groups`.

        Returns:
            The names of the parameters that are new here.

        Raises:
            LayerwiseError: for a model that holds nothing of what is here.

        Examples:
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> _ = model[0].requires_grad_(False)
            >>> optimizer = lw.Lanton(lw.param_groups(model))
            >>> _ = model[0].requires_grad_(True)
            >>> optimizer.add_trainable(model)
            ['0.weight', '0.bias']
        """
        check_model(model, self.param_groups)
        joined, groups = self._following.take_over(self.param_groups, model, batch)
        self._follow_parameters()
        added = [name for group in groups for name, _ in group["params"]]
        scheduled = any("initial_lr" in group for group in self.param_groups)
        for group in groups:
            self.add_param_group(group)
            if scheduled:  # so that a schedule can be made again in the middle
                self.param_groups[-1].setdefault("initial_lr", self.param_groups[-1]["lr"])
        check_rules(self.param_groups)
        return joined + added

    def _follow_parameters(self) -> None:
        """Take over what was unfrozen since, and give state to tensors that were put in a parameter's place."""
        for model in self._following.unfrozen() if self._following.frozen else ():
            self.add_trainable(model)
        fits = not torch.compiler.is_compiling() and self._lineup.fits(self.param_groups, self.state)
        if not fits and (lost := self._following.sync(self.param_groups, self.state)):
            warn(
                f"the optimizer's state (momentum, noise) of {first_few(map(repr, lost))} begins afresh: after training "
                "had begun the parameter was replaced by one of another shape or sharding. Load the optimizer's "
                "state_dict after such a change to go on from where it was"
            )

    # -------------------------------------------------------------------------------------------------- the step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step, outside the caller's autocast; ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups, compiling = self.param_groups, torch.compiler.is_compiling()
        cast = not compiling and torch._C._is_any_autocast_enabled()
        with under_autocast((param for group in groups for param in group["params"][:1]), None) if cast else nullcontext():
            lineup = Lineup() if compiling else self._lineup
            for group in groups:  # OneCycleLR and CyclicLR move Adam's first beta: so our momentum
                if "base_momentum" in group and isinstance(group["update"], Lmo):
                    group["momentum"] = group["betas"][0]
            if self._rates is not None and not compiling:
                self._rates = self._rates.checked(groups)
            self._follow_parameters()
            if lineup.refresh(groups, self.state, self.work.anywhere):
                self._look_at_jobs(lineup)
            moving = lineup.moving
            names, gradients = [job.name for job in moving], [job.grad for job in moving]
            finite = self.guard.check(names, gradients, self.work.anywhere, lineup.gradients)
            if finite is not False:
                if self._second.needed:
                    self._second.before_step(moving, groups, self.state, self.work)
                samples = self._vanishing.before(moving) if lineup.half else []
                for step in lineup.steps:
                    step(self.work, finite if isinstance(finite, Tensor) else None)
                for group in groups:
                    for key in STEP_COUNTS:
                        if key in group:
                            group[key] += 1
                if lineup.half:
                    self._vanishing.after(samples, groups)
            lineup.release()
            if self._second.needed:
                self._second.after_step()
        return loss

    def _look_at_jobs(self, lineup: Lineup) -> None:
        """Other parameters than before have a gradient, or options have changed: what else that means for the step."""
        if self._following.put_in_place(self.param_groups, lineup.jobs):
            self._follow_parameters()
            lineup.refresh(self.param_groups, self.state, self.work.anywhere)
        self._second.look(lineup.jobs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them what :meth:`hold_half` and :meth:`watch_replicas` noted."""
        self._second.forget()
        super().zero_grad(set_to_none)

    def hold_half(self) -> None:
        """Tell ``NoiseAdaptive(reference="independent")`` that half of the accumulated batch has gone backward.

        Call it after the backward pass of the first half of the micro-batches, and again after the last one where
        gradients are clipped before the step. The two halves must be of equal size, each micro-batch's loss divided by
        the number of micro-batches. Not for gradients that a GradScaler will unscale: the halves would keep its scale.

        Under DistributedDataParallel both halves have to be averaged over the processes: the backward pass before each
        call must not be under ``no_sync``.

        Raises:
            LayerwiseError: a sparse gradient; at the first call, different gradients of one parameter on the processes.
        """
        self._follow_parameters()
        self._second.hold_half(self.param_groups, self.state, self.work)

    def watch_replicas(self, model: nn.Module, comm_hook: Callable[..., Any] | None = None, state: Any = None) -> None:
        """Let ``NoiseAdaptive(reference="replicas")`` see each process's own gradients before they are averaged.

        Call it any time before the first backward pass (again does nothing), with the model that does the forward passes:

            model = DistributedDataParallel(model)         # or fully_shard(model)
            optimizer.watch_replicas(model)

        Accumulation, with ``no_sync`` or without, clipping by the global norm and a GradScaler need nothing more. Between
        backward and step a process keeps copies of 1/W of all gradients, W processes. It changes nothing for groups
        with other rules.

        Args:
            model: a ``DistributedDataParallel`` model, or one under ``fully_shard``.
            comm_hook: for a ``DistributedDataParallel`` that is to average by a communication hook, such as torch's
                ``fp16_compress_hook``: it holds one hook, and this one calls yours. It has to average, not add.
            state: of that hook.

        Raises:
            LayerwiseError: where the replicas cannot be seen, or there is only one; it names the alternatives.
        """
        self._second.watch(self, model, comm_hook, state)

    @property
    def work(self) -> MatrixWork:
        """Where the work on whole matrices happens; set it to choose otherwise."""
        if self._work is None and torch.compiler.is_compiling():  # which in torch 2.9 may set nothing here
            return default_work()
        self._work = self._work or default_work()
        return self._work

    @work.setter
    def work(self, work: MatrixWork) -> None:
        self._work = work

    # ------------------------------------------------------------------------------------- what users ask about

    def layer_rates(self) -> dict[str, LayerRate]:
        """Unit name -> squared norm, multiplier and effective learning rate (reading them waits for the device once).

        In the order of the model that ``lw.param_groups`` was given, as long as it is there, and else of the groups. The
        rates of the groups as they are: read before the scheduler moves on, and without what a ``FLeRM`` multiplies them by
        (its ``learning_rates()``).
        """
        self._follow_parameters()
        rates, places = rates_of_units(self.param_groups, self.state), self._following.places()
        return dict(sorted(rates.items(), key=lambda item: places.get(parameter_of(item[0]), len(places))))

    def __repr__(self) -> str:
        return f"{type(self).__name__} (\n{described(self.param_groups)}\n)"

    def groups_table(self) -> str:
        """A line for each group: what its rate, decay, update and geometry became, and the keys that are the user's own.

        Example:
            >>> groups = lw.param_groups(nn.Linear(4, 8), overrides={"bias": {"lr_scale": 0.5, "name": "biases"}})
            >>> print(lw.Scion(groups, lr=0.25).groups_table().splitlines()[-1])
            vector  1           8        0.125 = 0.25 * 0.5  0             lmo     -      VectorRMS()           name='biases'
        """
        return text_table([cells(group) for group in self.param_groups])

    @property
    def skipped_steps(self) -> int:
        """Steps skipped for a non-finite gradient (``nonfinite="skip"``)."""
        return self.guard.skipped_steps

    # ---------------------------------------------------------------------------------------- saving and loading

    def __getstate__(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key in ("recipe", "guard", "_work", "_rates")}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy watches no model.
        self._following, self._vanishing, self._second = Following(), Vanishing(), SecondGradients()
        self._lineup = Lineup()
        self._following.note(self.param_groups)
        self.defaults.pop("differentiable", None)  # torch adds it here, and groups added later would take it

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, text and tensors: loads with ``torch.load(weights_only=True)``."""
        self._follow_parameters()
        return saving.to_plain(super().state_dict(), self.skipped_steps)

    def load_state_dict(  # type: ignore[override]  # torch returns nothing
        self, state_dict: dict[str, Any], strict: bool = True
    ) -> LoadedState:
        """Load what ``state_dict`` gave.

        Args:
            state_dict: of an optimizer with the same parameters, or with ``strict=False`` of a model that has since
                grown or shrunk.
            strict: False takes the state of every parameter whose name is in both and whose state has the same shape,
                and the rates of its group. Of an embedding or head with more or fewer rows, those that are in both.
                The others keep the state they have: of a new optimizer, a fresh one.

        Returns:
            The names of the parameters that the state does not fit (``missing``), and of those that it holds and this
            optimizer does not (``unexpected``).

        Raises:
            LayerwiseError: where it was made for other parameters or by another optimizer
                (``layerwise.optim.state.state_dict.KEPT`` and its ``Update.fixed`` are the options that have to be the
                same).
        """
        self._following.sync(self.param_groups, self.state)  # what was lost comes now
        state_dict = copy(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        found = saving.load(self, self.recipe, state_dict, strict)
        self.guard.skipped_steps = int(state_dict.get(saving.SKIPPED, 0))
        self._second.restart()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)
        return found


def layerwise_optimizer(optimizer: Any) -> LayerwiseOptimizer:
    """The optimizer itself, where a trainer has wrapped it. Raises LayerwiseError where it is not one of layerwise's."""
    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, LayerwiseOptimizer):
        raise LayerwiseError(
            f"the optimizer is {type(inner).__name__}: layer rates need one of layerwise's, such as lw.Lanton"
        )
    return inner


@checked
def layer_rates(optimizer: Any) -> dict[str, LayerRate]:
    """``optimizer.layer_rates()``, also of an optimizer that a trainer has wrapped and that has no such method then.

    Args:
        optimizer: one of layerwise's, as it was made or as transformers' ``Trainer`` (``trainer.optimizer``), accelerate or
            lightning hold it.

    Raises:
        LayerwiseError: it is another one.

    Examples:
        >>> optimizer = lw.DMuon(lw.param_groups(nn.Linear(4, 8)), lr=0.01)
        >>> lw.layer_rates(optimizer)["weight"].lr
        0.01
    """
    return layerwise_optimizer(optimizer).layer_rates()
