"""Layerwise learning rates for PyTorch.

import layerwise as lw
print(lw.describe(model))
optimizer = lw.Lanton(lw.param_groups(model), lr=2e-3, weight_decay=0.1)
optimizer.layer_rates()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerwise.errors import LayerwiseError, NonFiniteError
from layerwise.function_space import (
    BaseRates,
    FLeRM,
    FunctionSpaceRecorder,
    Rates,
    SizeCheck,
    UnusualRule,
    Watch,
    WatchRecord,
    check,
    function_space_rates,
    match_lora,
    record_base,
    watch,
)
from layerwise.geometry import (
    ColNorm,
    ConvLayout,
    ConvTransposeLayout,
    Frobenius,
    Geometry,
    Layout,
    MatrixLayout,
    RowNorm,
    Sign,
    Spectral,
    Split,
    StackLayout,
    TransposedLayout,
    TransposedStackLayout,
    VectorLayout,
    VectorRMS,
    VectorStackLayout,
    describe,
    group_by_shape,
    nuclear_norm,
    param_groups,
    polar,
    spectral_conv,
)
from layerwise.optim import (
    DMuon,
    DualMuon,
    DualNormAdaptive,
    Lanton,
    LayerRate,
    LayerwiseOptimizer,
    LocalWork,
    Muon,
    NoiseAdaptive,
    NormAdaptive,
    RateRule,
    Scion,
    Signum,
    StaticRates,
    Update,
    optimizers,
    rate_rules,
    register_optimizer,
    register_rule,
)

if TYPE_CHECKING:
    from layerwise.optim import DistributedWork

__version__ = "0.1.0"
__all__ = [
    "BaseRates",
    "ColNorm",
    "ConvLayout",
    "ConvTransposeLayout",
    "DMuon",
    "DistributedWork",
    "DualMuon",
    "DualNormAdaptive",
    "FLeRM",
    "Frobenius",
    "FunctionSpaceRecorder",
    "Geometry",
    "Lanton",
    "LayerRate",
    "LayerwiseError",
    "LayerwiseOptimizer",
    "Layout",
    "LocalWork",
    "MatrixLayout",
    "Muon",
    "NoiseAdaptive",
    "NonFiniteError",
    "NormAdaptive",
    "RateRule",
    "Rates",
    "RowNorm",
    "Scion",
    "Sign",
    "Signum",
    "SizeCheck",
    "Spectral",
    "Split",
    "StackLayout",
    "StaticRates",
    "TransposedLayout",
    "TransposedStackLayout",
    "UnusualRule",
    "Update",
    "VectorLayout",
    "VectorRMS",
    "VectorStackLayout",
    "Watch",
    "WatchRecord",
    "__version__",
    "check",
    "describe",
    "function_space_rates",
    "group_by_shape",
    "match_lora",
    "nuclear_norm",
    "optimizers",
    "param_groups",
    "polar",
    "rate_rules",
    "record_base",
    "register_optimizer",
    "register_rule",
    "spectral_conv",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name == "DistributedWork":  # torch.distributed's tensors are slow to import
        from layerwise.optim import DistributedWork

        return DistributedWork
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
