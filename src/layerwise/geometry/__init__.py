"""The geometry of layers: norms, polar factors and nuclear norms, and which parameter of a model is what."""

from layerwise.geometry.norms import (
    ColNorm,
    Frobenius,
    Geometry,
    RowNorm,
    Sign,
    Spectral,
    VectorRMS,
    spectral_conv,
)
from layerwise.geometry.nuclear import nuclear_norm
from layerwise.geometry.polar import polar

__all__ = [
    "ColNorm",
    "Frobenius",
    "Geometry",
    "RowNorm",
    "Sign",
    "Spectral",
    "VectorRMS",
    "nuclear_norm",
    "polar",
    "spectral_conv",
]
