"""What each module's step does against the size of the model: a line a module, a panel a step."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerwise.function_space.checking.size_check import QUANTITIES, SizeCheck, Trend
from layerwise.lab.report import style

#: More modules than this have no colour of their own unless they are not flat.
_COLOURED = 12
_LEGEND: dict[str, Any] = {"fontsize": 6.5, "title_fontsize": 6.5, "handlelength": 1.4}


def size_slopes(check: SizeCheck) -> Figure:
    """Both axes are logarithmic: a flat line does the same at every size. Names are in the legend, with their slopes."""
    modules = [name for name, verdict in check.verdicts.items() if verdict != "none"]
    uneven = [name for name in modules if check.verdicts[name] in ("grows", "shrinks")]
    shown = modules if len(modules) <= _COLOURED else uneven[:_COLOURED]
    figure = style.new_figure(style.WIDTH, max(2.6, 0.19 * len(shown) + 0.8))
    panels = figure.subplots(1, len(check.steps), squeeze=False, sharey=True)[0]
    for axes, step in zip(panels, check.steps, strict=True):
        for trend in check.of(check.judged, step):
            if trend.module in modules:
                _draw(axes, trend, shown.index(trend.module) if trend.module in shown else None)
        axes.set_title(f"step {step}")
        axes.set_yscale("log")
        style.log_scale(axes.xaxis, check.sizes, 1.15)
        axes.set_xticks(check.sizes, [f"{size:g}" for size in check.sizes])
        axes.set_xlabel(check.axis)
    style.plain_log_ticks(panels[0].yaxis, *panels[0].get_ylim())
    panels[0].set_ylabel(QUANTITIES[check.judged])
    if shown:
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), **_LEGEND, title=f"slope at step {check.steps[-1]}")
    return figure


def _draw(axes: Axes, trend: Trend, number: int | None) -> None:
    """One line; without a number of its own it is grey and has no name."""
    points = [(size, value) for size, value in zip(trend.sizes, trend.values, strict=True) if value > 0]
    if not points:
        return
    sizes, values = zip(*points, strict=True)
    if number is None:
        axes.plot(sizes, values, color=style.GREY, lw=0.8, alpha=0.6)
        return
    slope = "" if trend.slope is None else f" {trend.slope:+.2f}"
    axes.plot(
        sizes, values, color=style.CYCLE[number % len(style.CYCLE)], marker=style.MARKERS[number // len(style.CYCLE)],
        ms=3, lw=1.2, label=f"{trend.module}{slope}",
    )  # fmt: skip
