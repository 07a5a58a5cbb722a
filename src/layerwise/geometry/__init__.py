"""The geometry of layers: norms, polar factors and nuclear norms, and which parameter of a model is what."""

from torch.serialization import add_safe_globals

from layerwise.geometry.axes import AxesLayout
from layerwise.geometry.describe import describe
from layerwise.geometry.factors import layer_decay, torch_groups, width_factors
from layerwise.geometry.found import Origin
from layerwise.geometry.groups import group_by_shape, param_groups
from layerwise.geometry.layout import (
    ConvLayout,
    ConvTransposeLayout,
    DepthwiseLayout,
    Layout,
    MatrixLayout,
    StackLayout,
    TransposedLayout,
    TransposedStackLayout,
    VectorLayout,
    VectorStackLayout,
)
from layerwise.geometry.norms import ColNorm, Frobenius, Geometry, RowNorm, Sign, VectorRMS
from layerwise.geometry.spectral.spectral import Spectral, nuclear_norm, polar, spectral_conv
from layerwise.geometry.split import Split

__all__ = [
    "AxesLayout",
    "ColNorm",
    "ConvLayout",
    "ConvTransposeLayout",
    "DepthwiseLayout",
    "Frobenius",
    "Geometry",
    "Layout",
    "MatrixLayout",
    "RowNorm",
    "Sign",
    "Spectral",
    "Split",
    "StackLayout",
    "TransposedLayout",
    "TransposedStackLayout",
    "VectorLayout",
    "VectorRMS",
    "VectorStackLayout",
    "describe",
    "group_by_shape",
    "layer_decay",
    "nuclear_norm",
    "param_groups",
    "polar",
    "spectral_conv",
    "torch_groups",
    "width_factors",
]

# Other optimizers take the groups of `param_groups` as they are, and save what is in them: let `torch.load` read that.
add_safe_globals([Origin, *(kind for name in __all__ if isinstance(kind := globals()[name], type))])
