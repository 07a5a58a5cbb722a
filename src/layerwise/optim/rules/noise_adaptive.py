"""LANTON's noise-adaptive layer rates (arXiv 2510.14009), and the gradients that noise is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.optim.rules.rule import Fraction, NormGroup, RateRule, register_rule, weighted_median
from layerwise.optim.work.job import Job, State, select_all, stack_of, stacked, stacked_by, state_and_gradients
from layerwise.optim.work.local import DualNorm, Source, deviation_of


@dataclass(frozen=True)
class Reference:
    """The gradient G' that LANTON compares the gradient G with.

    Args:
        difference: makes G - G', scaled so that for white noise of deviation sigma the square of its norm is that of
            2 sigma^2.
        warmup: how many gradients must have been seen before a difference means anything.
        buffer: the key in a parameter's state under which a gradient is kept for it; "" where none is.
        dtype: of the buffer, None for the parameter's own.
    """

    difference: Source
    warmup: int = 0
    buffer: str = ""
    dtype: torch.dtype | None = None

    def allocate(self, param: Tensor) -> State:
        return {self.buffer: torch.zeros_like(param, dtype=self.dtype or param.dtype)} if self.buffer else {}


def from_previous(jobs: Sequence[Job]) -> Tensor:
    """G' is the gradient of the step before (LANTON's practical option), of which a copy is kept: loops reuse ``.grad``."""
    # in float32 at least: the difference of two float16 gradients can leave float16
    dtype = torch.promote_types(jobs[0].grad.dtype, torch.float32)
    if len(jobs) == 1 or (jobs[0].alike is not None and jobs[0].alike.small):
        return stack_of(jobs).to(dtype) - stack_of(jobs, "previous_gradient")
    return stacked_by("sub", [job.grad.to(dtype) for job in jobs], [job.state["previous_gradient"] for job in jobs])


def from_momentum(jobs: Sequence[Job]) -> Tensor:
    """G' is the bias-corrected average of the gradients before this one: no buffer beyond the momentum's.

    The average before G went in is ``(M - (1 - beta) G) / beta``, and ``k`` gradients old it is corrected by
    ``1 - beta^k``. Its variance for white noise of deviation sigma is ``v sigma^2`` with
    ``v = (1 - beta) / (1 + beta) * (1 + beta^k) / (1 - beta^k)``, so ``sqrt(2 / (1 + v))`` puts the difference on the
    scale of the other options. The drift of the mean gradient over about ``1 / (1 - beta)`` steps is counted as noise.
    """
    beta, averages = jobs[0].group["momentum"], stack_of(jobs, "momentum_buffer")
    seen = stack_of(jobs, "gradients_seen")[:, 0]
    old = beta ** seen.clamp(min=1)  # beta^k; on the first step nothing is read
    variance = (1 - beta) / (1 + beta) * (1 + old) / (1 - old)
    scale = (2 / (1 + variance)).sqrt().reshape(-1, *[1] * (averages.ndim - 1))
    weight = 1 / (beta * (1 - old)).reshape(scale.shape)
    # float32 factors; in float32 at least, as the difference of two bfloat16 products would be rounding
    dtype = torch.promote_types(averages.dtype, torch.float32)
    return torch.sub(stack_of(jobs).to(dtype) * (scale * (1 + (1 - beta) * weight)), averages.to(dtype) * (scale * weight))


def between_halves(jobs: Sequence[Job]) -> Tensor:
    """G' is the gradient of an independent minibatch at the same weights (LANTON's theoretical option).

    The two halves of an accumulated batch are such a pair. With A what ``.grad`` holds after the first half and B after
    the whole (both divided by the whole batch's count), the halves' own means are ``2 A`` and ``2 (B - A)``; their
    difference has the noise of half batches, twice the variance, hence the factor ``sqrt(1/2)``.
    ``LayerwiseOptimizer.hold_half`` fills the buffer with A, then with ``2 A - B``.
    """
    return stack_of(jobs, "half_difference") * 2.0**0.5


def from_mean_of_replicas(jobs: Sequence[Job]) -> Tensor:
    """One replica's own gradient against the mean of all W, which is the gradient G of the step: no buffer in the state.

    Replicas see independent minibatches. With ``sigma^2`` the variance of their mean, one has ``W sigma^2``, and its
    difference from the mean ``(W - 1) sigma^2``: ``sqrt(2 / (W - 1))`` puts it on the scale of the other options. With two
    replicas that is exactly what `between_halves` gives. One process keeps its own gradient of each parameter and takes
    its norm; which one changes from step to step (``layerwise.optim.work.replicas``).
    """
    means = [job.grad if job.fetched is None else job.fetched for job in jobs]
    return stacked([deviation_of(job).from_mean(mean) for job, mean in zip(jobs, means, strict=True)])


#: Below it a floor would not keep a unit of no noise at all from an infinite rate.
SMALLEST_FLOOR = 1e-12

REFERENCES: dict[str, Reference] = {
    "previous": Reference(Source(from_previous), 1, "previous_gradient"),
    "previous_bf16": Reference(Source(from_previous), 1, "previous_gradient", torch.bfloat16),
    "momentum": Reference(Source(from_momentum), 1),
    "independent": Reference(Source(between_halves), buffer="half_difference"),
    "replicas": Reference(Source(from_mean_of_replicas, of_replica=True)),
}
#: The norms that a rule asks for, by reference and `size_normalised`: with a seed of its own at each step, the same after a
#: resume.
_NORMS: Final = {
    (name, normalised): [DualNorm(reference.difference, per_white_noise=normalised, seed="gradients_seen")]
    for name, reference in REFERENCES.items()
    for normalised in (False, True)
}


Alpha = Annotated[float, "a number in [0, 1e+15)", lambda number: 0 <= number < 1e15]
Floor = Annotated[float, f"a number in [{SMALLEST_FLOOR:g}, 1)", lambda number: SMALLEST_FLOOR <= number < 1]
GroupAlpha = Annotated[float, "a number in [0, 1000)", lambda number: 0 <= number < 1000]
ReferenceName = Annotated[str, f"one of {', '.join(map(repr, REFERENCES))}", lambda word: word in REFERENCES]


@register_rule("noise_adaptive")
@dataclass(frozen=True)
class NoiseAdaptive(RateRule):
    """LANTON's layer rates (arXiv 2510.14009): the noisier a unit's gradient, the smaller its rate.

    With ``D`` the difference between the gradient and its reference, for each unit

        H <- beta H + (1 - beta) ||D||_*^2          the dual norm of the unit's geometry; H starts at the first difference
        a  = alpha / sqrt(alpha^2 + H)
        multiplier = sqrt(a / a_ref) = ((alpha^2 + H_ref) / (alpha^2 + H))^(1/4)

    where ``a_ref`` is the largest (``anchor="max"``, the paper's) or the mean (``"mean"``) ``a`` of the norm group. With
    "max" the least noisy unit keeps 1 and every other slows down, so the base rate must be tuned again, upwards.

    Args:
        alpha: in units of a dual norm of the gradient (of ``size_normalised`` ones: of a gradient entry). It depends on
            loss scale, clipping, batch and layer size, and the paper does not give one. 0 is free of any scale: the
            limit alpha -> 0, ``(H_ref / H)^(1/4)`` with ``H`` kept above ``floor`` times the group's median, or with
            ``group_alpha`` an alpha in units of the group. The median counts a unit by its number of entries, and one
            that has shown no noise (``H = 0``, an expert without tokens) neither counts nor is compared.
        beta: weight of the old average of H.
        reference: ``"previous"`` (the step before; the paper's practical option), ``"previous_bf16"`` (its copy in
            bfloat16), ``"momentum"`` (no buffer) or ``"independent"`` (two halves of the accumulated batch; the paper's
            theoretical option, see ``LayerwiseOptimizer.hold_half``) or ``"replicas"`` (the theoretical option from
            the processes of DDP or FSDP2, see ``LayerwiseOptimizer.watch_replicas``).
        size_normalised: divide each dual norm by its value on white noise of unit deviation. Without it (the paper's) a
            unit looks noisier for its shape alone: an MLP's up projection 4x, 16x in H.
        anchor: the group's reference, ``"max"`` or ``"mean"``.
        floor: see ``alpha``. A unit of the group's median noise keeps at least ``floor ** 0.25``. Without it the queries
            and keys of a fresh transformer, whose noise is 1e-4 of the other layers', would slow all of those ten-fold.
        group_alpha: ``alpha`` over the root of the group's median H, in the place of the floor; 0: the floor.

    Examples:
        >>> lw.NoiseAdaptive(reference="momentum", size_normalised=True).floor
        0.1
        >>> optimizer = lw.DMuon(lw.param_groups(nn.Linear(4, 8)), rates=lw.NoiseAdaptive(reference="momentum"))
    """

    alpha: Alpha = 0.0
    beta: Fraction = 0.95
    reference: ReferenceName = "previous"
    size_normalised: bool = False
    anchor: Literal["max", "mean"] = "max"
    floor: Floor = 0.1
    group_alpha: GroupAlpha = 0.0
    #: H, how many gradients it is of, number of entries.
    unit_state: ClassVar = ("noise", "gradients_seen", "size")

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0.0 < self.alpha < 1e-15:
            raise LayerwiseError(
                f"NoiseAdaptive(alpha={self.alpha!r}): its square is lost in float32; give 0, which is the limit of it, "
                "or at least 1e-15"
            )
        if self.alpha and self.group_alpha:
            raise LayerwiseError(
                f"NoiseAdaptive(alpha={self.alpha!r}, group_alpha={self.group_alpha!r}): give one of them, the other 0"
            )

    @property
    def needs_halves(self) -> bool:  # type: ignore[override]
        return self.reference == "independent"

    @property
    def needs_replicas(self) -> bool:  # type: ignore[override]
        return self.reference == "replicas"

    def fits(self, group: Mapping[str, Any]) -> None:
        if self.reference != "momentum":
            return
        if group["momentum"] == 0.0:
            raise LayerwiseError(
                "NoiseAdaptive(reference='momentum') in a group with momentum=0: there is no average to compare the "
                "gradient with; give momentum > 0 or reference='previous'"
            )
        if group.get("momentum_warmup"):
            raise LayerwiseError(
                f"NoiseAdaptive(reference='momentum') in a group with momentum_warmup={group['momentum_warmup']}: what an "
                "average that warms up holds of each gradient is not known to it; give momentum_warmup=0 or "
                "reference='previous'"
            )

    def allocate(self, param: Tensor, units: Sequence[str], sizes: Sequence[int]) -> State:
        return super().allocate(param, units, sizes) | REFERENCES[self.reference].allocate(param)

    def squared_norm(self, state: State) -> Tensor:
        known: Tensor = state["gradients_seen"] > REFERENCES[self.reference].warmup
        return torch.where(known, state["noise"], float("nan"))

    def norms(self) -> Sequence[DualNorm]:
        return _NORMS[self.reference, self.size_normalised]

    def remember(self, jobs: Sequence[Job], keep: Tensor | None) -> None:
        if "previous_gradient" in jobs[0].state:
            previous, grads = state_and_gradients(jobs, "previous_gradient")
            torch._foreach_copy_(previous, grads if keep is None else select_all(keep, grads, previous))

    def update(self, units: NormGroup) -> Mapping[str, Tensor]:
        old, count = units.state["noise"], units.state["gradients_seen"]
        first = REFERENCES[self.reference].warmup
        # At most so large that the sum over units stays finite; a difference beyond float32 has a norm of inf or nan.
        most = torch.finfo(torch.float32).max / old.numel()
        square = units.norms[0].square().nan_to_num(nan=most).clamp(max=most)
        average = torch.where(count <= first, square, torch.lerp(square, old, self.beta))
        noise = torch.where(units.present & (count >= first), average, old)
        count = count + units.present
        known = count > first
        if self.alpha > 0.0:
            total = noise + self.alpha**2
        else:
            known = known & (noise > 0)
            median = weighted_median(noise, torch.where(known, units.state["size"], 0.0))
            # In units of the median nothing leaves float32's range.
            relative = noise / torch.where(median > 0, median, 1.0)
            total = relative + self.group_alpha**2 if self.group_alpha else relative.clamp(min=self.floor)
        rate = total.rsqrt()  # a / alpha
        among = torch.where(known, rate, 0.0)
        reference = among.max() if self.anchor == "max" else among.sum() / known.sum().clamp(min=1)
        multiplier = torch.where(known, (rate / reference).sqrt(), 1.0)
        return {"noise": noise, "gradients_seen": count, "multiplier": multiplier}
