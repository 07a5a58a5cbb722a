"""Layerwise learning rates for PyTorch.

import layerwise as lw
print(lw.describe(model))
optimizer = lw.Lanton(lw.param_groups(model), lr=2e-3, weight_decay=0.1)
optimizer.layer_rates()
"""

from layerwise.errors import LayerwiseError
from layerwise.geometry import param_groups
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
    "DMuon",
    "Lanton",
    "LayerRate",
    "LayerwiseError",
    "LayerwiseOptimizer",
    "Muon",
    "NoiseAdaptive",
    "NormAdaptive",
    "Scion",
    "Signum",
    "StaticRates",
    "__version__",
    "param_groups",
]
