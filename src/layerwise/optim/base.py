"""One update rule for every geometry-aware optimizer; the presets are values for its options."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from layerwise.errors import LayerwiseError
from layerwise.geometry import group_by_shape
from layerwise.optim import adamw, checkpoint
from layerwise.optim.guard import NonFiniteGuard
from layerwise.optim.matrix_work import MatrixJob, MatrixWork, default_work, local_part
from layerwise.optim.noise import NoiseAdaptive
from layerwise.optim.options import DEFAULTS, check_gradient, check_group, check_parameter
from layerwise.optim.rates import Gradients, RateRule, Reading, State, UnitReadings
from layerwise.optim.scaling import step_factor

Group = dict[str, Any]
#: Options by role; "default" is for every role that is not named.
Recipe = Mapping[str, Mapping[str, Any]]


class LayerRate(NamedTuple):
    """What one unit's learning rate is made of."""

    noise: float  # H of :class:`NoiseAdaptive`: the averaged squared dual norm; nan where none is measured
    multiplier: float
    lr: float  # the group's learning rate times the multiplier


class _Job(NamedTuple):
    name: str
    param: Tensor
    local: Tensor  # this process's part of it: the parameter itself unless it is sharded
    grad: Tensor  # likewise
    group: Group
    state: State  # likewise


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
        work: where the work on whole matrices happens, as the attribute ``work``, which can be set later too. None: over
            all processes of torch.distributed where it is initialised at the first step, else on this one.
        defaults: group options (``layerwise.optim.options.DEFAULTS``) for what neither a group nor the recipe gives.

    Raises:
        LayerwiseError: for an unknown option, a value outside its range, a complex or integer parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        recipe: Recipe | None = None,
        *,
        nonfinite: str = "raise",
        work: MatrixWork | None = None,
        **defaults: Any,
    ) -> None:
        check_group(defaults)
        self.recipe: Recipe = recipe or {}
        self.guard = NonFiniteGuard(nonfinite)
        self._work = work
        self._named = 0
        self._halves_held = 0
        groups = _as_groups(params)
        if not any(group["params"] for group in groups):
            raise LayerwiseError(
                "the optimizer got no parameters: pass layerwise.param_groups(model), or check requires_grad"
            )
        super().__init__(groups, DEFAULTS | defaults)

    # ------------------------------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of :func:`layerwise.param_groups`, or any group of parameters (then split by shape)."""
        if "layout" not in param_group:
            options = {k: v for k, v in param_group.items() if k != "params"}
            for group in group_by_shape(_as_list(param_group["params"])):
                self.add_param_group(group | options)
            return
        check_group(param_group)
        group = dict(param_group)
        recipe = self.recipe.get(str(group.get("role")), self.recipe.get("default", {}))
        # A preset's definition fills in what the user did not give; its geometry, if it has one, is its definition.
        group = {**recipe, **group, **{k: recipe[k] for k in ("geometry",) if k in recipe}}
        super().add_param_group(group)
        added = self.param_groups[-1]
        check_group(added)
        added["norm_group"] = added["norm_group"] or added["geometry"].norm_group
        if "param_names" not in added:
            added["param_names"] = [f"param_{self._named + i}" for i in range(len(added["params"]))]
        self._named += len(added["params"])
        for name, param in zip(added["param_names"], added["params"], strict=True):
            check_parameter(name, param)
            self._factors(added, param)  # fails here, not in the first step, where the scaling does not fit
            self.state[param] = self._allocate(added, name, param)

    def _allocate(self, group: Group, name: str, param: Tensor) -> State:
        with torch.no_grad():
            if group["update"] == "adamw":
                return adamw.allocate(param)
            state: State = {"momentum_buffer": torch.zeros_like(param)}
            rule: RateRule | None = group["noise"]
            if rule is not None:
                state |= rule.allocate(param, group["layout"].unit_names(name, param.shape))
            return state

    def _local_state(self, param: Tensor) -> State:
        """This process's part of the state, beside its parameter: frameworks move a model after the optimizer was made."""
        state = self.state[param]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.device != param.device:
                state[key] = value.to(param.device)
        if local_part(param) is param:
            return state
        return {
            key: local_part(value) if isinstance(value, Tensor) else value for key, value in state.items()
        }

    @staticmethod
    def _factors(group: Group, param: Tensor) -> tuple[float, ...]:
        if group["update"] == "adamw":
            return ()
        return tuple(
            group["radius"] * step_factor(group["scaling"], group["geometry"], d_out, d_in)
            for _, d_out, d_in in group["layout"].shapes(param.shape)
        )

    # -------------------------------------------------------------------------------------------------- the step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        states = {param: self._local_state(param) for group in self.param_groups for param in group["params"]}
        jobs = self._jobs(states)
        verdict = self.guard.check([job.name for job in jobs], [job.grad for job in jobs], self.work.anywhere)
        if verdict is False:
            return loss
        keep = verdict if isinstance(verdict, Tensor) else None
        lmo = [job for job in jobs if job.group["update"] == "lmo"]
        self._close_halves(lmo)
        self._update_momentum(lmo, keep)
        self._update_rates(lmo, states, keep)
        self._apply_directions(lmo, keep)
        self._adamw([job for job in jobs if job.group["update"] == "adamw"], keep)
        return loss

    def _jobs(self, states: Mapping[Tensor, State]) -> list[_Job]:
        """The parameters that have a gradient on any process; where this one has none it stands for zero."""
        rows = [
            (name, param, group)
            for group in self.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        ]
        present = self.work.anywhere(torch.tensor([param.grad is not None for _, param, _ in rows])).tolist()
        jobs = []
        for (name, param, group), here in zip(rows, present, strict=True):
            if here:
                local = local_part(param)
                grad = torch.zeros_like(local) if param.grad is None else param.grad
                check_gradient(name, grad)
                jobs.append(_Job(name, param, local, local_part(grad), group, states[param]))
        return jobs

    @staticmethod
    def _update_momentum(jobs: Sequence[_Job], keep: Tensor | None) -> None:
        by_weight: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for job in jobs:
            buffer = job.state["momentum_buffer"]
            grad = job.grad.to(buffer.dtype)
            buffers, grads = by_weight.setdefault(1.0 - job.group["momentum"], ([], []))
            buffers.append(buffer)
            # lerp from a number to itself changes nothing; a weight of 0 would not do, as 0 * nan is nan
            grads.append(grad if keep is None else torch.where(keep.bool(), grad, buffer))
        for weight, (buffers, grads) in by_weight.items():
            torch._foreach_lerp_(buffers, grads, weight)

    def _update_rates(
        self, jobs: Sequence[_Job], states: Mapping[Tensor, State], keep: Tensor | None
    ) -> None:
        adaptive = [(job, _gradients(job)) for job in jobs if job.group["noise"] is not None]
        wanted = [
            (job.param, _norm_job(job, reading))
            for job, gradients in adaptive
            for reading in job.group["noise"].readings(gradients, job.state)
        ]
        if wanted:
            read: dict[Tensor, list[Tensor]] = {}
            for (param, _), norms in zip(
                wanted, self.work.norms([matrix for _, matrix in wanted]), strict=True
            ):
                read.setdefault(param, []).append(norms)
            for rule, params in self._norm_groups():
                units = [UnitReadings(states[p], torch.stack(read[p]) if p in read else None) for p in params]
                if any(unit.readings is not None for unit in units):
                    rule.update(units, keep)
        for job, gradients in adaptive:
            job.group["noise"].remember(gradients, job.state, keep)

    def _norm_groups(self) -> list[tuple[RateRule, list[Tensor]]]:
        """Each rule with the parameters whose units it compares with one another, those without a gradient too."""
        found: dict[tuple[str, str], tuple[RateRule, list[Tensor]]] = {}
        for group in self.param_groups:
            if group["update"] == "lmo" and group["noise"] is not None:
                key = (group["norm_group"], repr(group["noise"]))
                found.setdefault(key, (group["noise"], []))[1].extend(group["params"])
        return list(found.values())

    def _apply_directions(self, jobs: Sequence[_Job], keep: Tensor | None) -> None:
        matrices = [
            MatrixJob(
                job.param,
                job.group["layout"],
                job.group["geometry"],
                _gradients(job).direction_input,
                self._factors(job.group, job.param),
                job.state.get("multiplier"),
            )
            for job in jobs
        ]
        for i, direction in self.work.directions(matrices):
            param, lr, decay = jobs[i].local, jobs[i].group["lr"], jobs[i].group["weight_decay"]
            if keep is not None:
                lr = lr * keep
            if decay != 0.0:
                param.mul_(1.0 - lr * decay)
            if isinstance(lr, Tensor):
                param.sub_(direction * lr)
            else:
                param.sub_(direction, alpha=lr)

    @staticmethod
    def _adamw(jobs: Sequence[_Job], keep: Tensor | None) -> None:
        by_group: dict[int, list[_Job]] = {}
        for job in jobs:
            by_group.setdefault(id(job.group), []).append(job)
        for members in by_group.values():
            params, grads, states = (
                [j.local for j in members],
                [j.grad for j in members],
                [j.state for j in members],
            )
            adamw.step(params, grads, states, members[0].group, keep)

    # ------------------------------------------------------------------------------------- what users ask about

    def hold_half(self) -> None:
        """Tell ``NoiseAdaptive(reference="independent")`` that half of the accumulated batch has gone backward.

        Call it after the backward pass of the first half of the micro-batches, and again after the last one where
        gradients are clipped before the step. The two halves must be of equal size, each micro-batch's loss divided by
        their number.
        """
        for group in self.param_groups:
            if (
                group["update"] == "lmo"
                and isinstance(group["noise"], NoiseAdaptive)
                and group["noise"].needs_halves
            ):
                for param in group["params"]:
                    self._hold_half(param)
        self._halves_held += 1

    @torch.no_grad()
    def _hold_half(self, param: Tensor) -> None:
        half = self._local_state(param)["half_difference"]
        grad = torch.zeros_like(half) if param.grad is None else local_part(param.grad)
        if self._halves_held == 0:
            half.copy_(grad)
        elif self._halves_held == 1:
            half.mul_(2.0).sub_(grad)

    def _close_halves(self, jobs: Sequence[_Job]) -> None:
        needed = any(
            isinstance(j.group["noise"], NoiseAdaptive) and j.group["noise"].needs_halves for j in jobs
        )
        if needed and self._halves_held == 0:
            raise LayerwiseError(
                "noise reference 'independent' compares two halves of the accumulated batch: call optimizer.hold_half() "
                "after the first half's backward(), or use reference='previous'"
            )
        if needed and self._halves_held == 1:
            self.hold_half()
        self._halves_held = 0

    @property
    def work(self) -> MatrixWork:
        """Where the work on whole matrices happens; set it to choose otherwise."""
        if self._work is None:
            self._work = default_work()
        return self._work

    @work.setter
    def work(self, work: MatrixWork) -> None:
        self._work = work

    def layer_rates(self) -> dict[str, LayerRate]:
        """Unit name -> noise, multiplier and effective learning rate (reading them waits for the device once)."""
        rows: list[tuple[str, float, int]] = []
        values: list[Tensor] = []
        for group in self.param_groups:
            lr = float(group["lr"])
            for name, param in zip(group["param_names"], group["params"], strict=True):
                state = self._local_state(param)
                if group["update"] == "adamw":
                    rows.append((name, lr, -1))
                    continue
                units = group["layout"].unit_names(name, param.shape)
                multiplier = state.get("multiplier")
                rows.extend((unit, lr, -1 if multiplier is None else i) for i, unit in enumerate(units))
                if multiplier is not None:
                    rule = group["noise"]
                    values.append(torch.stack([rule.noise(state), multiplier]))
        known = iter(torch.cat([v.to(values[0].device) for v in values], dim=1).T.tolist() if values else [])
        rates = {}
        for name, lr, index in rows:
            noise, multiplier_value = next(known) if index >= 0 else (math.nan, 1.0)
            rates[name] = LayerRate(noise, multiplier_value, lr * multiplier_value)
        return rates

    @property
    def skipped_steps(self) -> int:
        """Steps skipped for a non-finite gradient (``nonfinite="skip"``)."""
        return self.guard.skipped_steps

    # ---------------------------------------------------------------------------------------- saving and loading

    def __getstate__(self) -> dict[str, Any]:
        own = {"recipe": self.recipe, "guard": self.guard, "_work": self._work, "_named": self._named}
        return super().__getstate__() | own | {"_halves_held": 0}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, text and tensors: loads with ``torch.load(weights_only=True)``."""
        return checkpoint.to_plain(super().state_dict(), self.skipped_steps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave.

        Raises:
            LayerwiseError: where it was made for other parameters, another geometry, layout, noise rule or update.
        """
        checkpoint.check(self, state_dict)
        live = [{key: group[key] for key in checkpoint.KEPT} for group in self.param_groups]
        lrs = [group["lr"] for group in self.param_groups]
        super().load_state_dict(checkpoint.without_extras(state_dict))
        for group, kept, lr in zip(self.param_groups, live, lrs, strict=True):
            group.update(kept)
            if isinstance(lr, Tensor):
                group["lr"] = lr.fill_(group["lr"])
        checkpoint.restore_precision(self, state_dict)
        self.guard.skipped_steps = checkpoint.skipped_steps(state_dict)


def _gradients(job: _Job) -> Gradients:
    buffer, beta = job.state["momentum_buffer"], job.group["momentum"]

    def look_ahead() -> Tensor:
        return torch.lerp(job.grad.to(buffer.dtype), buffer, beta)

    ahead = look_ahead if job.group["nesterov"] else lambda: buffer
    return Gradients(job.grad, job.group["geometry"], buffer, ahead, beta)


def _norm_job(job: _Job, reading: Reading) -> MatrixJob:
    shapes = job.group["layout"].shapes(job.param.shape)
    factors = tuple(
        1.0 / reading.geometry.white_noise_dual(d_out, d_in) if reading.per_white_noise else 1.0
        for _, d_out, d_in in shapes
    )
    return MatrixJob(
        job.param, job.group["layout"], reading.geometry, reading.tensor, factors, seed=reading.seed
    )


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _as_groups(params: Iterable[Any]) -> list[Group]:
    if isinstance(params, Tensor):
        raise LayerwiseError(
            "params is a single tensor: pass layerwise.param_groups(model) or a list of parameters"
        )
    given = list(params)
    if all(isinstance(item, dict) for item in given):
        return given
    return group_by_shape(given)
