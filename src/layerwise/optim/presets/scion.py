"""Scion (arXiv 2502.07529)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final

from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.geometry.found import MATRIX_ROLES
from layerwise.optim.named_optimizers import register_optimizer
from layerwise.optim.optimizer import LayerwiseOptimizer
from layerwise.optim.rules.rule import RateRule

#: Scion's radii in its nanoGPT set-up: 50 for the blocks, 3000 for the tied head. Vectors have none there; 1 is ours.
SCION_RADIUS: Final[Mapping[str, float]] = {"hidden": 50.0, "embedding": 1.0, "head": 3000.0, "vector": 1.0}


@register_optimizer("scion", title="Scion")
class Scion(LayerwiseOptimizer):
    """Scion: the unit step of every layer's own norm, times a radius for each kind of layer. No AdamW anywhere.

    Unconstrained form ``W <- W - lr * radius * lmo(M)``; ``weight_decay=1`` makes it the constrained one,
    ``W <- (1 - lr) W - lr * radius * lmo(M)``, which keeps every weight's norm within its radius.

    Args:
        params: ``layerwise.param_groups(model)``; its geometries are used as they are.
        lr: of every group: a step of norm one moves by ``lr * radius``.
        momentum: weight of the old average (Scion's paper gives 1 minus it, 0.1).
        weight_decay: decoupled; 0 unconstrained, 1 constrained. Gains and biases are left out, as everywhere: an override
            ``{"role:vector": {"weight_decay": 1.0}}`` constrains them too.
        radius: by role; roles that are not named take that of ``"hidden"``.
        rates: a rate rule, e.g. ``NoiseAdaptive()``.
        nonfinite: ``"raise"`` or ``"skip"``.
        rounding: of bfloat16 weights, ``"nearest"`` or ``"stochastic"``.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> optimizer = lw.Scion(lw.param_groups(model), lr=5e-4, radius={"hidden": 10.0, "head": 100.0})
        >>> model(torch.arange(6)).square().mean().backward()
        >>> optimizer.step()
        >>> [(group["role"], group["radius"]) for group in optimizer.param_groups]
        [('embedding', 1.0), ('hidden', 10.0), ('vector', 1.0), ('head', 100.0)]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2**-12,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        radius: Annotated[Mapping[str, float], "radii by role, such as {'hidden': 50.0, 'head': 3000.0}"] = SCION_RADIUS,
        rates: RateRule | None = None,
        nonfinite: str = "raise",
        rounding: str = "nearest",
    ) -> None:
        radii = dict(SCION_RADIUS) | dict(radius)
        unknown = set(radii) - {*SCION_RADIUS, *MATRIX_ROLES}
        if unknown:
            raise LayerwiseError(
                f"Scion(radius=...) names {sorted(unknown)}: the roles are {', '.join([*SCION_RADIUS, *MATRIX_ROLES[1:]])}"
            )
        recipe = {role: {"radius": value} for role, value in {**radii, "default": radii["hidden"]}.items()}
        options: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rates": rates}
        super().__init__(params, recipe, nonfinite=nonfinite, rounding=rounding, **options)
