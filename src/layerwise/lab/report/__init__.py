"""`layerwise report`: figures and tables of runs in one self-contained page."""

from layerwise.lab.report.load import Contender, RunData, contenders, load_runs
from layerwise.lab.report.page import Story, write_report
from layerwise.lab.report.transfer import RateCurve

__all__ = ["Contender", "RateCurve", "RunData", "Story", "contenders", "load_runs", "write_report"]
