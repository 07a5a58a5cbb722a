"""`layerwise report`: figures and tables of runs in one self-contained page."""

from layerwise.lab.report.grouping import Contender, RateCurve, contenders, load_runs
from layerwise.lab.report.page import Story, write_report

__all__ = ["Contender", "RateCurve", "Story", "contenders", "load_runs", "write_report"]
