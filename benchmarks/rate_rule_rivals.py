"""Rivals and controls of the rate rule, which only `rate_rule.py` needs: it registers them, the package does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor
from torch.optim import Optimizer

import layerwise as lw
from layerwise.optim.presets.dual_muon import DUAL_MUON_MOMENTUM_WARMUP
from layerwise.optim.work.job import current_momentum


@dataclass(frozen=True)
class OverPolarFactor(lw.Frobenius):
    """The Frobenius norm over that of a polar factor in the same shape, `sqrt(min(d_out, d_in))`."""

    def dual_norm(self, g: Tensor, *, seed: int | Tensor = 0) -> Tensor:
        return super().dual_norm(g, seed=seed) / min(g.shape[-2:]) ** 0.5


@dataclass(frozen=True)
class UpdateFloor(lw.RateRule):
    """A floor on the update-to-weight ratio: `max(1, ratio ||W||_F / ||O||_F)`, O the polar factor of the step.

    The one per-matrix rule that the public GPT-2 speed-run's optimizer track kept; there without weight decay.
    """

    ratio: float = 0.35

    def norms(self) -> Sequence[lw.DualNorm]:
        return [lw.DualNorm(lambda job: job.local, OverPolarFactor())]

    def update(self, units: Any) -> Mapping[str, Tensor]:
        floor = (self.ratio * units.norms[0]).clamp(min=1.0)
        return {"multiplier": torch.where(units.present, floor, units.state["multiplier"])}


@dataclass(frozen=True)
class PermutedDualNorm(lw.DualNormAdaptive):
    """The control for whose multiplier is whose: those of `DualNormAdaptive`, each at another unit of its group.

    The permutation is drawn once, from `seed` and the number of units.
    """

    seed: int = 0

    def update(self, units: Any) -> Mapping[str, Tensor]:
        new = dict(super().update(units))
        own = new["multiplier"]
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(self.seed))
        return new | {"multiplier": own[order.to(own.device)]}


def by_unit(means: Mapping[str, float]) -> dict[str, float]:
    """Every unit's own mean multiplier."""
    return dict(means)


def by_kind(means: Mapping[str, float]) -> dict[str, float]:
    """One multiplier for all blocks: the mean over the units whose names differ only in numbers."""
    kinds: dict[str, list[float]] = {}
    for unit, mean in means.items():
        kinds.setdefault(_kind(unit), []).append(mean)
    return {unit: fmean(kinds[_kind(unit)]) for unit in means}


def _kind(unit: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", unit)


class MuonMaxMomo(Optimizer):
    """MuonMax with model-based momentum (arXiv 2510.09827), written from its formulas.

    Steepest descent, not normalised, in the norm `max_l ||W_l||_2` over matrices beside Adam's norm over the rest:

        d^2 = matrix_scale S^2 + sum m^2 / (sqrt(v) + eps)       S = sum over matrices of ||M_l||_*
        rate = min(lr, (F - lower_bound + <m, w>)_+ / d^2)       F: the average of loss - <g, w>, with the momentum's weight
        W_l <- (1 - lr weight_decay) W_l - rate matrix_scale S polar(M_l)
        w   <- (1 - lr weight_decay) w - rate m / (sqrt(v) + eps)

    Averages begin at their first value. The nuclear norms are this step's (`<M, polar(M)>`), where the paper takes the last
    step's to save a pass.

    Args:
        params: `layerwise.param_groups(model)`; fused matrices are taken apart as for every optimizer here.
        lr: largest rate.
        weight_decay: decoupled; groups that have their own (0 of gains and biases) keep it.
        momentum: of the averages.
        beta2: of v.
        eps: beside sqrt(v).
        matrix_scale: of the matrices' part of the norm.
        lower_bound: of the loss.
        polar: method of the polar factor.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-8,
        matrix_scale: float = 10.0,
        lower_bound: float = 0.0,
        polar: str = "auto",
    ) -> None:
        self.momentum, self.beta2, self.eps = momentum, beta2, eps
        self.matrix_scale, self.lower_bound, self.polar = matrix_scale, lower_bound, polar
        self.model_value: Tensor | None = None  # F
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """One step; `closure` returns the loss that the gradients are of."""
        loss = closure().detach()
        moving = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        directions: dict[Tensor, Tensor] = {}
        sum_of_norms, square, along_gradient, along_average = loss.new_zeros(4).unbind()
        for group, p in moving:
            average = self._averaged(p, "momentum", p.grad, self.momentum)
            along_gradient += (p * p.grad).sum()
            along_average += (p * average).sum()
            if _is_matrix(group):
                directions[p] = self._polar(group["layout"], average)
                sum_of_norms += (directions[p] * average).sum()
            else:
                scale = self._averaged(p, "square", p.grad.square(), self.beta2).sqrt() + self.eps
                directions[p] = average / scale
                square += (directions[p] * average).sum()
        now = loss - along_gradient
        before = now if self.model_value is None else self.model_value
        self.model_value = torch.lerp(now, before, self.momentum)
        room = (self.model_value - self.lower_bound + along_average).clamp(min=0.0)
        longest = room / (self.matrix_scale * sum_of_norms.square() + square).clamp(min=1e-12)
        for group, p in moving:
            p.mul_(1.0 - group["lr"] * group["weight_decay"])
            factor = self.matrix_scale * sum_of_norms if _is_matrix(group) else 1.0
            p.sub_(longest.clamp(max=group["lr"]) * factor * directions[p])
        return loss

    def _averaged(self, p: Tensor, key: str, value: Tensor, weight: float) -> Tensor:
        """The running average of a parameter under `key`, which begins at its first value."""
        average: Tensor = self.state[p].setdefault(key, value.clone())
        return average.lerp_(value, 1.0 - weight)

    def _polar(self, layout: lw.Layout, tensor: Tensor) -> Tensor:
        stacks = [lw.polar(stack, self.polar) for stack in layout.to_matrices(tensor)]
        return layout.from_matrices(stacks, tensor.shape)


def _is_matrix(group: Mapping[str, Any]) -> bool:
    return group["role"] not in ("embedding", "head", "vector")


def plain_groups(params: Iterable[Mapping[str, Any]], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of `layerwise.param_groups` as any torch optimizer takes them: rates and decay in every group.

    Such optimizers know of no fused matrices and of no stored order: each weight is one tensor, as it lies.
    """
    return [
        {
            "params": [p for _, p in group["params"]],
            "lr": group.get("lr", lr),
            "weight_decay": group.get("weight_decay", weight_decay),
        }
        for group in params
    ]


def as_shipped(params: Iterable[Mapping[str, Any]], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The same as pytorch-optimizer's Muons take them, which want to be told what is a weight inside of the network."""
    given = list(params)
    groups = zip(given, plain_groups(given, lr, weight_decay), strict=True)
    return [{**plain, "use_muon": _is_matrix(group)} for group, plain in groups]


def nor_muon(params: Iterable[Mapping[str, Any]], lr: float = 2e-2, *, weight_decay: float = 0.1) -> Optimizer:
    """NorMuon (arXiv 2510.05491) of pytorch-optimizer, whose steps have entries of RMS 0.2 (the paper's Algorithm 1)."""
    made: Optimizer = pytorch_optimizer.NorMuon(as_shipped(params, lr, weight_decay), update_scale="match_rms")
    return made


def ada_muon(params: Iterable[Mapping[str, Any]], lr: float = 2e-2, *, weight_decay: float = 0.1) -> Optimizer:
    """AdaMuon (arXiv 2507.11005) of pytorch-optimizer, whose steps have entries of RMS 0.2 by default."""
    made: Optimizer = pytorch_optimizer.AdaMuon(as_shipped(params, lr, weight_decay))
    return made


def soap(params: Iterable[Mapping[str, Any]], lr: float = 3e-3, *, weight_decay: float = 0.1) -> Optimizer:
    """SOAP (arXiv 2409.11321) of pytorch-optimizer. Sides of more than 1,024 have no preconditioner: those of the words."""
    groups = plain_groups(params, lr, weight_decay)
    made: Optimizer = pytorch_optimizer.SOAP(groups, lr=lr, max_precondition_dim=1024)
    return made


class FramedAdaMuon(Optimizer):
    """AdaMuon of pytorch-optimizer on the matrices, in `DualMuon`'s frame.

    Its first beta warms up to 0.95 as our momentum does. The other groups have our quasi-hyperbolic AdamW, the head at the
    base rate. What AdaMuon leaves out of ours stays out: it has no look-ahead, and takes a fused projection as one matrix.

    Args:
        params: `layerwise.param_groups(model)`.
        lr: of all groups that have none of their own.
        weight_decay: likewise.
    """

    def __init__(self, params: Iterable[Mapping[str, Any]], lr: float = 8e-3, *, weight_decay: float = 0.1) -> None:
        groups = list(params)
        matrices = as_shipped(filter(_is_matrix, groups), lr, weight_decay)
        self.matrices = pytorch_optimizer.AdaMuon(matrices, betas=(0.95, 0.95))
        rest = [group for group in groups if not _is_matrix(group)]
        self.rest = lw.DualMuon(rest, lr=lr, weight_decay=weight_decay, head=1.0, rates=None)
        for group in self.matrices.param_groups:
            group.update(momentum=0.95, momentum_warmup=DUAL_MUON_MOMENTUM_WARMUP, momentum_steps=0)
        super().__init__([p for group in groups for _, p in group["params"]], {"lr": lr})
        self.param_groups = [*self.matrices.param_groups, *self.rest.param_groups]  # the same dicts: schedules reach them

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        """One step; the closure is not called."""
        for group in self.matrices.param_groups:
            group["betas"] = (current_momentum(group), group["betas"][1])
            group["momentum_steps"] += 1
        self.matrices.step()
        self.rest.step()


def lamb(params: Iterable[Mapping[str, Any]], lr: float = 1e-2, *, weight_decay: float = 0.1) -> Optimizer:
    """LAMB (arXiv 1904.00962) of pytorch-optimizer: Adam's step of each tensor made as long as the tensor, times `lr`.

    It decays weights beside that step, the paper within it.
    """
    made: Optimizer = pytorch_optimizer.Lamb(plain_groups(params, lr, weight_decay), lr=lr)
    return made


def adam_mini(
    params: Iterable[Mapping[str, Any]],
    lr: float = 1e-3,
    *,
    weight_decay: float = 0.1,
    width: int = 128,
    heads: int = 4,
) -> Optimizer:
    """Adam-mini (arXiv 2406.16793) of pytorch-optimizer: one second average for each block of a tensor.

    It finds blocks by names: embeddings and heads called as in Llama have one for each entry, `q_proj` and `k_proj` one for
    each head, all else one for the whole tensor, a GPT-2's fused projection and positions among them.
    """
    groups = list(params)
    names = [name for group in groups for name, _ in group["params"]]
    tensors = [p for group in groups for _, p in group["params"]]
    named = SimpleNamespace(named_parameters=lambda: zip(names, tensors, strict=True))
    made: Optimizer = pytorch_optimizer.AdamMini(named, lr=lr, num_embeds=width, num_heads=heads)
    own = {p: plain for plain in plain_groups(groups, lr, weight_decay) for p in plain["params"]}
    for group in made.param_groups:  # one of each tensor, which knows of no rates and decays some vectors
        plain = own[group["params"][0]]
        group.update(lr=plain["lr"], weight_decay=plain["weight_decay"])
    return made


def prodigy(params: Iterable[Mapping[str, Any]], lr: float = 1.0, *, weight_decay: float = 0.1) -> Optimizer:
    """Prodigy (arXiv 2306.06101) of pytorch-optimizer: Adam that estimates its own rate, which `lr` multiplies."""
    made: Optimizer = pytorch_optimizer.Prodigy(plain_groups(params, lr, weight_decay), lr=lr)
    return made


def register() -> None:
    """Let configs name them."""
    lw.register_rule("update_floor")(UpdateFloor)
    lw.register_rule("permuted_dual_norm")(PermutedDualNorm)
    lw.register_optimizer("muonmax-momo", title="MuonMax-Momo")(MuonMaxMomo)
    lw.register_optimizer("nor-muon", title="NorMuon")(nor_muon)
    lw.register_optimizer("ada-muon", title="AdaMuon")(ada_muon)
    lw.register_optimizer("soap", title="SOAP")(soap)
    lw.register_optimizer("framed-ada-muon", title="AdaMuon in our frame")(FramedAdaMuon)
    lw.register_optimizer("lamb", title="LAMB")(lamb)
    lw.register_optimizer("adam-mini", title="Adam-mini")(adam_mini)
    lw.register_optimizer("prodigy", title="Prodigy")(prodigy)
