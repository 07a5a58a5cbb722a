"""The optimizers of the field, each a few values for the options of one update rule.

Definitions: Muon (Jordan 2024), D-Muon (Moonlight, arXiv 2502.16982), Scion (arXiv 2502.07529), LANTON
(arXiv 2510.14009). Each takes the groups of :func:`layerwise.param_groups` and, as ``rates=``, any rate rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final

from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.geometry import Sign
from layerwise.optim.groups.complete import Recipe
from layerwise.optim.groups.options import check_option
from layerwise.optim.named_optimizers import register_optimizer
from layerwise.optim.optimizer import LayerwiseOptimizer
from layerwise.optim.rules.dual_norm_adaptive import DualNormAdaptive
from layerwise.optim.rules.noise_adaptive import NoiseAdaptive
from layerwise.optim.rules.norm_adaptive import NormAdaptive
from layerwise.optim.rules.rule import RateRule
from layerwise.optim.rules.static import StaticRates

MATRIX_ROLES: Final = ("hidden", "conv", "experts", "lora_A", "lora_B")


def _matrices_and_the_rest(matrices: Mapping[str, Any], rest: Mapping[str, Any]) -> Recipe:
    for key, value in rest.items():
        check_option(key, value, called=f"adamw_{key}")
    return dict.fromkeys(MATRIX_ROLES, matrices) | {"default": {"update": "adamw", **rest}}


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
        super().__init__(
            params,
            _matrices_and_the_rest(matrices, rest),
            nonfinite=nonfinite,
            rounding=rounding,
            lr=lr,
            weight_decay=weight_decay,
        )


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
        super().__init__(
            params,
            _matrices_and_the_rest(matrices, rest),
            nonfinite=nonfinite,
            rounding=rounding,
            lr=lr,
            weight_decay=weight_decay,
        )


#: What a matrix in the middle of its group takes of the base rate in :class:`DualMuon`, and what the head takes; embedding
#: and vectors take all of it. Found on two small models (docs/optimizers.md).
DUAL_MUON_RADIUS: Final = 0.55
DUAL_MUON_HEAD: Final = 2.0


@register_optimizer("dual-muon", title="Dual Muon", rates=DualNormAdaptive)
class DualMuon(LayerwiseOptimizer):
    """D-Muon with a rate for each matrix: the larger its direction's dual norm, the smaller (:class:`DualNormAdaptive`).

    D-Muon's frame, with two differences. Each matrix has the rate that its own dual norm, which the step computes anyway,
    gives it among the others. And groups have rates of their own: a matrix in the middle has 0.55 ``lr``, embedding and
    vectors ``lr``, the head, a tied one too, twice ``lr``.

    Args:
        params: ``layerwise.param_groups(model)``.
        lr: of all groups; best about twice D-Muon's.
        radius: what matrix steps are multiplied by.
        head: what the head's rate is multiplied by.
        rates: the rule; None: the same optimizer with every multiplier at 1.
        momentum: weight of the old average.
        nesterov: step along Nesterov's look-ahead.
        weight_decay: decoupled, at the group's rate.
        adamw_betas: of the AdamW groups.
        adamw_eps: theirs.
        nonfinite: ``"raise"`` or ``"skip"``.
        rounding: of bfloat16 weights, ``"nearest"`` or ``"stochastic"``.

    Examples:
        >>> import torch, layerwise as lw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
        >>> optimizer = lw.DualMuon(lw.param_groups(model), lr=2e-3)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        radius: float = DUAL_MUON_RADIUS,
        head: float = DUAL_MUON_HEAD,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        rates: RateRule | None = DualNormAdaptive(),  # noqa: B008 (frozen)
        nonfinite: str = "raise",
        rounding: str = "nearest",
    ) -> None:
        check_option("lr", lr, called="lr")
        check_option("radius", head, called="head")
        matrices = {"scaling": "rms_0.2", "radius": radius, "momentum": momentum, "nesterov": nesterov}
        rest = {"betas": adamw_betas, "eps": adamw_eps}
        recipe = {
            **_matrices_and_the_rest({**matrices, "rates": rates}, rest),
            "head": {"update": "adamw", **rest, "lr": lr * head},
        }
        super().__init__(
            params, recipe, nonfinite=nonfinite, rounding=rounding, lr=lr, weight_decay=weight_decay
        )


#: Scion's radii in its nanoGPT set-up: 50 for the blocks, 3000 for the tied head. Vectors have none there; 1 is ours.
SCION_RADIUS: Final[Mapping[str, float]] = {"hidden": 50.0, "embedding": 1.0, "head": 3000.0, "vector": 1.0}


@register_optimizer("scion", title="Scion")
class Scion(LayerwiseOptimizer):
    """Scion: the unit step of every layer's own norm, times a radius for each kind of layer. No AdamW anywhere.

    Unconstrained form ``W <- W - lr * radius * lmo(M)``; ``weight_decay=1`` makes it the constrained one,
    ``W <- (1 - lr) W - lr * radius * lmo(M)``, which keeps every weight's norm within its radius.

    Args:
        params: ``layerwise.param_groups(model)``; its geometries are used as they are.
        lr: of every group, in units of the radii.
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
        radius: Annotated[
            Mapping[str, float], "radii by role, such as {'hidden': 50.0, 'head': 3000.0}"
        ] = SCION_RADIUS,
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
        recipe: Recipe = {role: {"radius": value} for role, value in radii.items()} | {
            "default": {"radius": radii["hidden"]}
        }
        super().__init__(
            params,
            recipe,
            nonfinite=nonfinite,
            rounding=rounding,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            rates=rates,
        )


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
        super().__init__(
            params,
            {"default": {"geometry": Sign()}},
            nonfinite=nonfinite,
            rounding=rounding,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            rates=rates,
        )


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
        super().__init__(
            params,
            nonfinite=nonfinite,
            rounding=rounding,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            scaling=scaling,
            rates=rates,
        )
