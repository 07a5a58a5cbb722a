"""Muon (Jordan 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from layerwise.optim.groups.complete import matrices_and_the_rest
from layerwise.optim.named_optimizers import register_optimizer
from layerwise.optim.optimizer import LayerwiseOptimizer
from layerwise.optim.rules.rule import RateRule


@register_optimizer("muon", title="Muon")
class Muon(LayerwiseOptimizer):
    """Jordan's Muon on matrices inside the network, AdamW on embeddings, head and vectors.

    Step ``lr * sqrt(max(1, d_out / d_in)) * NS5(nesterov momentum)``. Unlike ``torch.optim.Muon`` it takes the whole
    model, tells fused projections apart and knows which way round ``Conv1D`` keeps its weights.

    Args:
        params: ``layerwise.param_groups(model)``.
        lr: of the matrices (per step, dimensionless: a step's spectral norm over the scaling).
        momentum: weight of the old average.
        nesterov: step along Nesterov's look-ahead.
        weight_decay: decoupled, at ``lr``; for the AdamW groups at ``adamw_lr``.
        adamw_lr: of the AdamW groups.
        adamw_betas: theirs.
        adamw_eps: theirs.
        rates: a rate rule for the matrices, e.g. ``NoiseAdaptive()``.
        nonfinite: ``"raise"`` or ``"skip"``.
        rounding: of bfloat16 weights, ``"nearest"`` or ``"stochastic"``.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> optimizer = lw.Muon(lw.param_groups(model), lr=0.02, adamw_lr=3e-3)
        >>> model(torch.arange(6)).square().mean().backward()
        >>> optimizer.step()
        >>> [(group["role"], str(group["update"]), group["lr"]) for group in optimizer.param_groups]
        [('embedding', 'adamw', 0.003), ('hidden', 'lmo', 0.02), ('vector', 'adamw', 0.003), ('head', 'adamw', 0.003)]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        adamw_lr: float | Tensor = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-10,
        rates: RateRule | None = None,
        nonfinite: str = "raise",
        rounding: str = "nearest",
    ) -> None:
        matrices = {"scaling": "floored", "momentum": momentum, "nesterov": nesterov, "rates": rates}
        rest = {"lr": adamw_lr, "betas": adamw_betas, "eps": adamw_eps}
        recipe = matrices_and_the_rest(matrices, rest)
        super().__init__(params, recipe, nonfinite=nonfinite, rounding=rounding, lr=lr, weight_decay=weight_decay)
