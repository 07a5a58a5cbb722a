"""Geometry-aware optimizers with a learning rate for each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import layerwise.optim.presets
import layerwise.optim.rules
from layerwise.common.discover import import_files
from layerwise.common.layer_rate import LayerRate
from layerwise.optim.named_optimizers import optimizers, register_optimizer
from layerwise.optim.optimizer import LayerwiseOptimizer, layer_rates
from layerwise.optim.presets.d_muon import DMuon
from layerwise.optim.presets.dual_muon import DualMuon
from layerwise.optim.presets.lanton import Lanton
from layerwise.optim.presets.muon import Muon
from layerwise.optim.presets.scion import Scion
from layerwise.optim.presets.signum import Signum
from layerwise.optim.rules.dual_norm_adaptive import DualNormAdaptive
from layerwise.optim.rules.noise_adaptive import NoiseAdaptive
from layerwise.optim.rules.norm_adaptive import NormAdaptive
from layerwise.optim.rules.rule import RateRule, rate_rules, register_rule
from layerwise.optim.rules.static import StaticRates
from layerwise.optim.updates import Update
from layerwise.optim.work.local import DualNorm, LocalWork

if TYPE_CHECKING:
    from layerwise.optim.work.distributed import DistributedWork

__all__ = [
    "DMuon",
    "DistributedWork",
    "DualMuon",
    "DualNorm",
    "DualNormAdaptive",
    "Lanton",
    "LayerRate",
    "LayerwiseOptimizer",
    "LocalWork",
    "Muon",
    "NoiseAdaptive",
    "NormAdaptive",
    "RateRule",
    "Scion",
    "Signum",
    "StaticRates",
    "Update",
    "layer_rates",
    "optimizers",
    "rate_rules",
    "register_optimizer",
    "register_rule",
]


def __getattr__(name: str) -> Any:
    if name == "DistributedWork":  # torch.distributed's tensors are slow to import
        from layerwise.optim.work.distributed import DistributedWork

        return DistributedWork
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


import_files(layerwise.optim.presets)
import_files(layerwise.optim.rules)
