"""Layerwise learning rates for PyTorch.

import layerwise as lw
print(lw.describe(model))
optimizer = lw.Lanton(lw.param_groups(model), lr=2e-3, weight_decay=0.1)
optimizer.layer_rates()
"""

from layerwise.errors import LayerwiseError, NonFiniteError
from layerwise.function_space import (
    BaseRates,
    FLeRM,
    FunctionSpaceRecorder,
    Rates,
    function_space_rates,
    record_base,
)
from layerwise.geometry import describe, group_by_shape, param_groups
from layerwise.optim import (
    DMuon,
    Lanton,
    LayerRate,
    LayerwiseOptimizer,
    Muon,
    NoiseAdaptive,
    NormAdaptive,
    Scion,
    Signum,
    StaticRates,
)

__version__ = "0.1.0"
__all__ = [
    "BaseRates",
    "DMuon",
    "FLeRM",
    "FunctionSpaceRecorder",
    "Lanton",
    "LayerRate",
    "LayerwiseError",
    "LayerwiseOptimizer",
    "Muon",
    "NoiseAdaptive",
    "NonFiniteError",
    "NormAdaptive",
    "Rates",
    "Scion",
    "Signum",
    "StaticRates",
    "__version__",
    "describe",
    "function_space_rates",
    "group_by_shape",
    "param_groups",
    "record_base",
]
