"""`layerwise report`: figures and tables of runs in one self-contained page."""

from layerwise.lab.report.figures.rate_grid import RateCurve
from layerwise.lab.report.page import Story, write_report
from layerwise.lab.report.run_data import Contender, RunData, contenders, load_runs

__all__ = ["Contender", "RateCurve", "RunData", "Story", "contenders", "load_runs", "write_report"]
