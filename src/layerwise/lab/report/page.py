"""The report of one run or of several: one self-contained HTML file, and its figures as files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from layerwise.common.files import write_whole
from layerwise.common.layer_rate import parameter_of
from layerwise.errors import LayerwiseError
from layerwise.lab.config.identity import hashed
from layerwise.lab.report import tables
from layerwise.lab.report.figures.heatmap import layer_heat_maps
from layerwise.lab.report.figures.loss import loss_against_rate, loss_curves
from layerwise.lab.report.figures.units import effective_rates, rate_per_layer, stacked_shares
from layerwise.lab.report.grouping import Contender, RateCurve
from layerwise.lab.report.style import PHONE, WIDE, page_figure, save_figure, theme_css
from layerwise.lab.runs.directory import check_output
from layerwise.lab.runs.recorded import Run

PAGE = "report.html"


@dataclass(frozen=True)
class Plan:
    """A figure to be drawn: the name of its files, its section of the page, and how to draw it in an `Arrangement`."""

    name: str
    section: str
    draw: partial[Figure]  # of a function whose docstring is the caption
    folded: str = ""  # a title under which the page folds it away

    @property
    def caption(self) -> str:
        return " ".join((self.draw.func.__doc__ or "").split())

    def made(self, folder: Path) -> tuple[str, str]:
        """As SVG for a wide page, in files of that folder too, and for a phone, where panels stand below one another."""
        wide = save_figure(lambda: self.draw(WIDE), folder, self.name)
        return wide, page_figure(lambda: self.draw(PHONE), f"{self.name}-phone")


@dataclass(frozen=True)
class Story:
    """What a report says besides what is in the runs."""

    title: str = "Training report"
    notes: Sequence[str] = ()  # shown at the top: what a reader has to know before the numbers
    command: str = ""
    grid: Sequence[RateCurve] = ()  # losses by base rate
    standings: Sequence[Mapping[str, str]] = ()  # a row for each contender, title -> cell

    @property
    def tuned(self) -> bool:
        """Whether any contender was given more than one rate."""
        return any(len(curve.rates) > 1 for curve in self.grid)


def check_report(folder: Path) -> None:
    """Raises LayerwiseError where a report could not be written into `folder`, or another page is there."""
    if folder.suffix == ".html":
        raise LayerwiseError(f"-o: {folder} names a page: name a folder, {PAGE} and its figures are written into it")
    check_output(folder / PAGE, "Layerwise</title>")


def write_report(groups: Sequence[Contender], folder: Path, story: Story | None = None) -> Path:
    """Write `report.html` and `figures/` into `folder` and return the page's path. Raises LayerwiseError."""
    check_report(folder)
    story = story or Story()
    runs = [run for group in groups for run in group.runs]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures = [(plan, *plan.made(folder / "figures")) for plan in plans(groups, story)]
        loader = PackageLoader("layerwise.lab", "report")
        templates = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        templates.filters["code"] = code_spans
        page = templates.get_template("template.html").render(
            theme=theme_css(),
            story=story,
            notes=[*story.notes, *warnings(runs)],
            figures=figures,
            sections=list(dict.fromkeys(plan.section for plan, _, _ in figures)),
            tables=tables,
            groups=groups,
            runs=runs,
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
        path = folder / PAGE
        write_whole(path, page)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise LayerwiseError(f"report {folder}: {reason}; choose another with -o") from None
    return path


def code_spans(text: str) -> Markup:
    """A sentence whose `words in backticks` are set as code."""
    parts = [f"<code>{escape(part)}</code>" if i % 2 else str(escape(part)) for i, part in enumerate(text.split("`"))]
    return Markup("".join(parts))


def plans(groups: Sequence[Contender], story: Story) -> Iterator[Plan]:
    """The figures that these runs have data for, in the order of the page."""
    if any(len(run.train_loss) or len(run.val_loss) for group in groups for run in group.runs):
        yield Plan("loss", "Loss", partial(loss_curves, groups))
    if story.tuned:
        yield Plan("loss_against_rate", "Learning rate", partial(loss_against_rate, story.grid))
    for group in groups:
        yield from _layer_plans(group)
        yield from _function_space_plans(group)


def _layer_plans(group: Contender) -> Iterator[Plan]:
    run = group.runs[0]
    history = run.history
    if history is None or not (history.has_norms or history.has_multiplier):
        return
    roles = {str(row["name"]): row.get("role") for row in run.parameters}
    vectors = [unit for unit in history.ruled if roles.get(parameter_of(unit)) == "vector"]
    matrices = [unit for unit in history.ruled if roles.get(parameter_of(unit)) != "vector"]
    slug, section = _slug(group.label), f"Layers: {group.label}"
    if matrices:
        yield Plan(f"layers_{slug}", section, partial(layer_heat_maps, run, matrices))
    if vectors:
        folded = "Gains and biases" if matrices else ""
        yield Plan(f"vectors_{slug}", section, partial(layer_heat_maps, run, vectors), folded)
    if history.has_multiplier:
        yield Plan(f"rates_{slug}", section, partial(effective_rates, run))


def _function_space_plans(group: Contender) -> Iterator[Plan]:
    run = group.runs[0]
    if not any(line.get("rates") for line in run.function_space):
        return
    slug, section = _slug(group.label), f"Function space: {group.label}"
    yield Plan(f"function_space_{slug}", section, partial(rate_per_layer, run))
    yield Plan(f"shares_{slug}", section, partial(stacked_shares, run))


def _slug(label: str) -> str:
    return "".join(ch if ch.isalnum() else "_" for ch in label.lower()).strip("_")


def warnings(runs: Sequence[Run]) -> list[str]:
    """What makes these runs incomparable or incomplete, in sentences."""
    notes = []
    corpora = [run.info.get("corpus") or {} for run in runs]
    if len({str(corpus.get("sha256") or hashed(corpus)) for corpus in corpora}) > 1:
        notes.append("These runs were trained on different texts: their losses cannot be compared.")
    if len({hashed(run.config.get("model")) for run in runs}) > 1:
        notes.append("These runs trained different models: compare their losses with that in mind.")
    if len({run.last("tokens") for run in runs if run.status == "finished"}) > 1:
        notes.append("These runs differ in length, and with it in their schedules: equal tokens are not equal progress.")
    unfinished = "Not finished (still running, or killed: it can be resumed)"
    for status, text in (("diverged", "Diverged"), ("running", unfinished)):
        if names := [run.name for run in runs if run.status == status]:
            notes.append(f"{text}: {', '.join(names)}.")
    return notes
