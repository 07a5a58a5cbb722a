"""The report of one run or of several: one self-contained HTML file, and its figures as files beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from layerwise.common.files import write_whole
from layerwise.common.layer_rate import parameter_of
from layerwise.errors import LayerwiseError
from layerwise.lab.config.identity import hashed
from layerwise.lab.report import tables
from layerwise.lab.report.figures import effective_rates, function_space, heatmap, loss
from layerwise.lab.report.figures.rate_grid import loss_against_rate
from layerwise.lab.report.grouping import Contender
from layerwise.lab.report.rate_curve import RateCurve
from layerwise.lab.report.style import PHONE, WIDE, Arrangement, page_figure, save_figure, theme_css
from layerwise.lab.runs.directory import check_output
from layerwise.lab.runs.recorded import Run

PAGE = "report.html"


@dataclass(frozen=True)
class Plan:
    """A figure to be drawn: the name of its files, its section of the page, its caption, and how to draw it."""

    name: str
    section: str
    caption: str
    draw: Callable[[Arrangement], Figure]
    folded: str = ""  # a title under which the page folds it away

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
    grid: Sequence[RateCurve] = ()  # losses on the grid of base rates, where one was run
    standings: Sequence[Mapping[str, str]] = ()  # a row for each contender, title -> cell


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
        yield Plan(
            "loss", "Loss", "Training loss (line, smoothed; the raw values behind it) and validation loss (markers), "
            "against training tokens and against training time. Losses of the first fifth may lie above the axis."
            + (" Lighter lines are further seeds." if any(len(g.runs) > 1 for g in groups) else ""),
            lambda on: loss.loss_curves(groups, on),
        )  # fmt: skip
    if story.grid:
        yield Plan(
            "loss_against_rate", "Learning rate", "Final validation loss on each optimizer's own grid of base rates, all "
            "with the same schedule length: dots are seeds, the line their mean, the large dot the best rate. An open "
            "ring marks an optimum at the end of its grid, which is then no optimum; a cross a rate that diverged.",
            lambda on: loss_against_rate(story.grid, on),
        )  # fmt: skip
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
    what = (
        f"{heatmap.measured(run)} of each unit, on a log scale, over the median of its norm group (it is measured in the "
        "dual norm of the group, so only the ratio can be compared between groups), and the multiplier on the base "
        "learning rate; rows from the input of the network to its output. Parameters whose rates no rule sets are left out."
    )
    if matrices:
        yield Plan(f"layers_{slug}", section, what, lambda on: heatmap.layer_heat_maps(run, matrices, on))
    if vectors:
        folded = "Gains and biases" if matrices else ""
        yield Plan(f"vectors_{slug}", section, what, lambda on: heatmap.layer_heat_maps(run, vectors, on), folded)
    if history.has_multiplier:
        yield Plan(
            f"rates_{slug}", section, "Effective learning rate and rate multiplier, coloured by kind of tensor: of each "
            "kind the median, the range shaded, and a thin line per unit. Norm groups without a spread are left out. A name "
            "stands where the median of its units ends.",
            lambda on: effective_rates.effective_rates(run, on),
        )  # fmt: skip


def _function_space_plans(group: Contender) -> Iterator[Plan]:
    run = group.runs[0]
    if not any(line.get("rates") for line in run.function_space):
        return
    slug, section = _slug(group.label), f"Function space: {group.label}"
    yield Plan(
        f"function_space_{slug}", section, "Function-space learning rate of each parameter: how much one update of it "
        "alone changes the outputs of the network. Log scale; of each kind of tensor the median, the range shaded, and a "
        "thin line per parameter.",
        lambda on: function_space.rate_per_layer(run, on),
    )  # fmt: skip
    yield Plan(
        f"shares_{slug}", section, "Share of each block, and of each kind of tensor, in the sum of these rates.",
        lambda on: function_space.stacked_shares(run, on),
    )  # fmt: skip


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
