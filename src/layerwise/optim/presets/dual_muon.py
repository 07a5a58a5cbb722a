"""D-Muon with rates by dual norm: ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from torch import Tensor

from layerwise.optim.groups.complete import matrices_and_the_rest
from layerwise.optim.groups.options import check_option
from layerwise.optim.named_optimizers import register_optimizer
from layerwise.optim.optimizer import LayerwiseOptimizer
from layerwise.optim.rules.dual_norm_adaptive import DualNormAdaptive
from layerwise.optim.rules.rule import RateRule

#: What a matrix in the middle of its group takes of the base rate in :class:`DualMuon`, and what the head takes; embedding
#: and vectors take all of it. Found on two small models (docs/optimizers.md).
DUAL_MUON_RADIUS: Final = 0.55
DUAL_MUON_HEAD: Final = 3.0
#: Steps over which its momentum grows, likewise.
DUAL_MUON_MOMENTUM_WARMUP: Final = 200
#: Weight of the average in the step of its AdamW groups: QHAdam's own recommendation.
DUAL_MUON_NU: Final = 0.7


@register_optimizer("dual-muon", title="Dual Muon", rates=DualNormAdaptive)
class DualMuon(LayerwiseOptimizer):
    """D-Muon with a rate for each matrix: the larger its direction's dual norm, the smaller (:class:`DualNormAdaptive`).

    D-Muon's frame, with four differences. Each matrix has the rate that its own dual norm, which the step computes anyway,
    gives it among the others. Groups have rates of their own: a matrix in the middle has 0.55 ``lr``, embedding and vectors
    ``lr``, the head, a tied one too, three times ``lr`` (its ``lr_scale``, so that a loop may write one rate into all
    groups). The momentum of matrices warms up. And AdamW's groups step along a mixture of average and gradient (QHAdam).

    Args:
        params: ``layerwise.param_groups(model)``.
        lr: of all groups: try 4 to 8 times AdamW's, or one to two times D-Muon's. The default suits models of a few million
            parameters; larger ones and longer runs want less.
        radius: what matrix steps are multiplied by.
        head: what the head's rate is multiplied by.
        rates: the rule; None: the same optimizer with every multiplier at 1.
        momentum: weight of the old average, in the end.
        momentum_warmup: steps over which it gets there, the average's window growing evenly; 0: at once.
        nesterov: step along Nesterov's look-ahead.
        weight_decay: decoupled, at the group's rate.
        adamw_betas: of the AdamW groups.
        adamw_nu: weight of the average in their step, the rest is the gradient's (QHAdam, arXiv 1810.06801); 1: AdamW.
        adamw_eps: theirs.
        nonfinite: ``"raise"`` or ``"skip"``.
        rounding: of bfloat16 weights, ``"nearest"`` or ``"stochastic"``.

    Examples:
        >>> import torch, layerwise as lw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
        >>> optimizer = lw.DualMuon(lw.param_groups(model), lr=8e-3)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 8e-3,
        *,
        momentum: float = 0.95,
        momentum_warmup: int = DUAL_MUON_MOMENTUM_WARMUP,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        radius: float = DUAL_MUON_RADIUS,
        head: float = DUAL_MUON_HEAD,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_nu: float = DUAL_MUON_NU,
        adamw_eps: float = 1e-8,
        rates: RateRule | None = DualNormAdaptive(),  # noqa: B008 (frozen)
        nonfinite: str = "raise",
        rounding: str = "nearest",
    ) -> None:
        check_option("radius", head, called="head")
        check_option("nu", adamw_nu, called="adamw_nu")
        check_option("momentum_warmup", momentum_warmup, called="momentum_warmup")
        matrices = {"scaling": "rms_0.2", "radius": radius, "momentum": momentum, "nesterov": nesterov}
        if momentum_warmup:
            matrices["momentum_warmup"] = momentum_warmup
        rest = {"betas": adamw_betas, "eps": adamw_eps, "nu": adamw_nu}
        recipe = {
            **matrices_and_the_rest({**matrices, "rates": rates}, rest),
            "head": {"update": "adamw", **rest, "lr_scale": head},
        }
        super().__init__(params, recipe, nonfinite=nonfinite, rounding=rounding, lr=lr, weight_decay=weight_decay)
