"""What a sweep's folder shows: the figure as PNG, PDF and SVG, the table as Markdown and JSON."""

from __future__ import annotations

from pathlib import Path

from layerwise.lab.experiments.sweep.analysis import Curve, Transfer, curves_of, transfers
from layerwise.lab.experiments.sweep.results import RESULTS, read_results
from layerwise.lab.experiments.sweep.sweep_config import SweepConfig
from layerwise.lab.experiments.sweep.table import markdown
from layerwise.lab.experiments.sweep.trial_plan import make_plan
from layerwise.lab.runs.directory import write_json

LOSS_NAMES = {"val_loss": "Final validation loss", "loss": "Final training loss"}


def analyse(config: SweepConfig, folder: Path) -> tuple[list[Curve], list[Transfer]]:
    """Curves and table of the results in a sweep's folder, as far as there are any."""
    curves = curves_of(config, make_plan(config), read_results(folder / RESULTS))
    return curves, transfers(
        curves, {method: config.sweep.step_of(method) for method in config.sweep.methods}
    )


def write_report(config: SweepConfig, folder: Path) -> list[Transfer]:
    """Writes `transfer.png`, `.pdf`, `.svg`, `table.md` and `table.json` and returns the table."""
    from layerwise.lab.experiments.sweep.figure import Panels, transfer_figure
    from layerwise.lab.report.style import save_figure

    curves, rows = analyse(config, folder)
    panels = Panels("", curves, config.sweep.axis, LOSS_NAMES[config.sweep.loss])
    save_figure(lambda: transfer_figure([panels]), folder, "transfer")
    (folder / "table.md").write_text(markdown(rows, config.sweep.axis), encoding="utf-8")
    write_json(folder / "table.json", [row.to_dict() for row in rows])
    return rows
