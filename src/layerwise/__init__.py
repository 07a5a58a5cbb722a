"""Layerwise learning rates for PyTorch.

import layerwise as lw
print(lw.describe(model))
optimizer = lw.Lanton(lw.param_groups(model), lr=2e-3, weight_decay=0.1)
optimizer.layer_rates()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
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
        AxesLayout,
        ColNorm,
        ConvLayout,
        ConvTransposeLayout,
        DepthwiseLayout,
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
        DistributedWork,
        DMuon,
        DualMuon,
        DualNorm,
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
        layer_rates,
        optimizers,
        rate_rules,
        register_optimizer,
        register_rule,
    )

__version__ = "0.1.0"
__all__ = [
    "AxesLayout",
    "BaseRates",
    "ColNorm",
    "ConvLayout",
    "ConvTransposeLayout",
    "DMuon",
    "DepthwiseLayout",
    "DistributedWork",
    "DualMuon",
    "DualNorm",
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
    "layer_rates",
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


#: Where the names are. Imported when the first of them is asked for: Ctrl-C in the seconds that torch takes then comes to
#: the command line, which ends quietly.
_ROOMS: Final = ("errors", "geometry", "optim", "function_space")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"layerwise.{name}")
    if name in __all__:
        for room in map(import_module, (f"layerwise.{name}" for name in _ROOMS)):
            if hasattr(room, name):
                return globals().setdefault(name, getattr(room, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
