"""Signum: sign descent with momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from layerwise.geometry import Sign
from layerwise.optim.named_optimizers import register_optimizer
from layerwise.optim.optimizer import LayerwiseOptimizer
from layerwise.optim.rules.rule import RateRule


@register_optimizer("signum", title="Signum")
class Signum(LayerwiseOptimizer):
    """Signum: the sign of the momentum for every parameter, the unit step of the max-abs norm.

    Args: as :class:`Scion`; ``lr`` is the size of every entry's step.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> before = model[1].weight.detach().clone()
        >>> optimizer = lw.Signum(lw.param_groups(model), lr=1e-3)
        >>> model(torch.arange(6)).square().mean().backward()
        >>> optimizer.step()
        >>> round(float((model[1].weight.detach() - before).abs().max()), 6)
        0.001
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        rates: RateRule | None = None,
        nonfinite: str = "raise",
        rounding: str = "nearest",
    ) -> None:
        recipe = {"default": {"geometry": Sign()}}
        options: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rates": rates}
        super().__init__(params, recipe, nonfinite=nonfinite, rounding=rounding, **options)
