"""Geometry-aware optimizers with a learning rate for each layer."""

from layerwise.optim.layer_rates import LayerRate
from layerwise.optim.optimizer import LayerwiseOptimizer
from layerwise.optim.presets import DMuon, Lanton, Muon, Scion, Signum
from layerwise.optim.rules.noise_adaptive import NoiseAdaptive
from layerwise.optim.rules.norm_adaptive import NormAdaptive, StaticRates
from layerwise.optim.rules.rule import RateRule

__all__ = [
    "DMuon",
    "Lanton",
    "LayerRate",
    "LayerwiseOptimizer",
    "Muon",
    "NoiseAdaptive",
    "NormAdaptive",
    "RateRule",
    "Scion",
    "Signum",
    "StaticRates",
]
