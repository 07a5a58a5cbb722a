"""Geometry-aware optimizers with a learning rate for each layer."""

from layerwise.optim.base import LayerwiseOptimizer
from layerwise.optim.controls import NormAdaptive, StaticRates
from layerwise.optim.noise import NoiseAdaptive
from layerwise.optim.presets import DMuon, Lanton, Muon, Scion, Signum
from layerwise.optim.rates import RateRule
from layerwise.optim.report import LayerRate

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
