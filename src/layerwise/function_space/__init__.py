"""Function-space learning rates and FLeRM (arXiv 2502.17405), for any model and any torch optimizer."""

from layerwise.function_space.checking.check_model import check
from layerwise.function_space.checking.size_check import SizeCheck
from layerwise.function_space.matching.base_rates import BaseRates, record_base
from layerwise.function_space.matching.flerm import FLeRM
from layerwise.function_space.matching.lora import match_lora
from layerwise.function_space.measuring.measurement import Measurement, function_space_rates
from layerwise.function_space.rates import Rates
from layerwise.function_space.steps.watched_step import FunctionSpaceRecorder
from layerwise.function_space.watching.picture import plot_watch
from layerwise.function_space.watching.watch_record import UnusualRule, WatchRecord
from layerwise.function_space.watching.watcher import Watch, watch

__all__ = [
    "BaseRates",
    "FLeRM",
    "FunctionSpaceRecorder",
    "Measurement",
    "Rates",
    "SizeCheck",
    "UnusualRule",
    "Watch",
    "WatchRecord",
    "check",
    "function_space_rates",
    "match_lora",
    "plot_watch",
    "record_base",
    "watch",
]
