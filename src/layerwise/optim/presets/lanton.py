"""LANTON (arXiv 2510.14009)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from layerwise.optim.named_optimizers import register_optimizer
from layerwise.optim.optimizer import LayerwiseOptimizer
from layerwise.optim.rules.noise_adaptive import NoiseAdaptive
from layerwise.optim.rules.rule import RateRule
from layerwise.optim.rules.static import StaticRates


@register_optimizer("lanton", title="LANTON", rates=NoiseAdaptive)
@register_optimizer("static", title="Static", rates=StaticRates)
class Lanton(LayerwiseOptimizer):
    """LANTON: Scion's geometry in every layer, each unit's rate set by its gradient noise.

    ``lr_unit = lr * ((alpha^2 + H_min) / (alpha^2 + H))^(1/4)``, see :class:`NoiseAdaptive`. The least noisy unit of a norm
    group runs at ``lr``, every other slower: tune ``lr`` again, upwards, when coming from an optimizer without noise.

    Args:
        params: ``layerwise.param_groups(model)``; its geometries are used as they are.
        lr: of every group; with ``scaling="rms_0.2"`` about the size of AdamW's.
        momentum: weight of the old average.
        weight_decay: decoupled, at ``lr`` without the multiplier. The paper does not say; 0 is Scion's form.
        scaling: the static factor of each step, which the paper does not give: ``"rms_0.2"`` (entries of RMS 0.2, the
            scale of its D-Muon baseline) or ``"unit"`` (norm one, Scion's, to be used with a ``radius`` in the groups).
        rates: a rate rule; None: the same optimizer with every multiplier at 1.
        nonfinite: ``"raise"`` or ``"skip"``.
        rounding: of bfloat16 weights, ``"nearest"`` or ``"stochastic"``.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> optimizer = lw.Lanton(lw.param_groups(model), lr=2e-3)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.arange(6)).square().mean().backward()
        ...     optimizer.step()
        >>> optimizer.layer_rates()["1.weight"].multiplier <= 1.0
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        scaling: str = "rms_0.2",
        rates: RateRule | None = NoiseAdaptive(),  # noqa: B008 (frozen)
        nonfinite: str = "raise",
        rounding: str = "nearest",
    ) -> None:
        options: dict[str, Any] = {"momentum": momentum, "scaling": scaling, "rates": rates}
        super().__init__(params, nonfinite=nonfinite, rounding=rounding, lr=lr, weight_decay=weight_decay, **options)
