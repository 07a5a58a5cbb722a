"""Function-space learning rates and FLeRM (arXiv 2502.17405), for any model and any torch optimizer."""

from layerwise.function_space.checking.check_model import check
from layerwise.function_space.checking.size_check import SizeCheck, Trend
from layerwise.function_space.matching.base_rates import BaseRate, BaseRates, Fingerprint, record_base
from layerwise.function_space.matching.decide import Matched, MatchReport
from layerwise.function_space.matching.depth_map import infer_depth
from layerwise.function_space.matching.flerm import FLeRM
from layerwise.function_space.matching.lora import LoraMatch, match_lora
from layerwise.function_space.measure import function_space_rates
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.rates import Rate, Rates
from layerwise.function_space.steps.watched_step import FunctionSpaceRecorder, JsonLines, Record
from layerwise.function_space.watching.unusual import Unusual, UnusualRule
from layerwise.function_space.watching.watch_record import ModuleReading, Together, WatchRecord
from layerwise.function_space.watching.watcher import Watch, watch

__all__ = [
    "BaseRate",
    "BaseRates",
    "FLeRM",
    "Fingerprint",
    "FunctionSpaceRecorder",
    "JsonLines",
    "LoraMatch",
    "MatchReport",
    "Matched",
    "Measurement",
    "ModuleReading",
    "Rate",
    "Rates",
    "Record",
    "SizeCheck",
    "Together",
    "Trend",
    "Unusual",
    "UnusualRule",
    "Watch",
    "WatchRecord",
    "check",
    "function_space_rates",
    "infer_depth",
    "match_lora",
    "record_base",
    "watch",
]
