"""D-Muon (Moonlight, arXiv 2502.16982), and NAMO, which is D-Muon with :class:`NormAdaptive`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from layerwise.optim.groups.complete import matrices_and_the_rest
from layerwise.optim.named_optimizers import register_optimizer
from layerwise.optim.optimizer import LayerwiseOptimizer
from layerwise.optim.rules.norm_adaptive import NormAdaptive
from layerwise.optim.rules.rule import RateRule


@register_optimizer("d-muon", title="D-Muon")
@register_optimizer("namo", title="NAMO", rates=NormAdaptive)
class DMuon(LayerwiseOptimizer):
    """Moonlight's Muon: matrix steps with entries of RMS 0.2, so that one AdamW-sized ``lr`` serves all groups.

    Step ``lr * 0.2 sqrt(max(d_out, d_in)) * NS5(nesterov momentum)``, decoupled decay at plain ``lr``. Moonlight's
    ``buf = momentum * buf + G`` is this average times ``1 / (1 - momentum)``, which the unit step does not see.

    Args: as :class:`Muon`, with one ``lr`` for all groups.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> optimizer = lw.DMuon(lw.param_groups(model), lr=2e-3)
        >>> model(torch.arange(6)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.layer_rates()["1.weight"].lr
        0.002
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        rates: RateRule | None = None,
        nonfinite: str = "raise",
        rounding: str = "nearest",
    ) -> None:
        matrices = {"scaling": "rms_0.2", "momentum": momentum, "nesterov": nesterov, "rates": rates}
        rest = {"betas": adamw_betas, "eps": adamw_eps}
        recipe = matrices_and_the_rest(matrices, rest)
        super().__init__(params, recipe, nonfinite=nonfinite, rounding=rounding, lr=lr, weight_decay=weight_decay)
