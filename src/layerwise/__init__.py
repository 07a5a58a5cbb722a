"""Layerwise learning rates for PyTorch."""

from layerwise.errors import LayerwiseError

__version__ = "0.1.0"
__all__ = ["LayerwiseError", "__version__"]
