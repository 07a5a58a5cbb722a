"""Function-space learning rates and FLeRM (arXiv 2502.17405), for any model and any torch optimizer."""

from layerwise.function_space.measure import Measurement, function_space_rates
from layerwise.function_space.rates import Rate, Rates
from layerwise.function_space.recorder import FunctionSpaceRecorder, JsonLines, Record

__all__ = [
    "FunctionSpaceRecorder",
    "JsonLines",
    "Measurement",
    "Rate",
    "Rates",
    "Record",
    "function_space_rates",
]
